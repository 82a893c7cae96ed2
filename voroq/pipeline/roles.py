"""Who reads and who writes the residual stream, found by running the model on stubs. No model is named here.

The stream is the sum that starts with the embedding, to which every block adds. A rotation of it can be folded into the weights if
(1) all that reads it are RMS norms, whose outputs only linears read, (2) all that is added to it are outputs of linears. To find
out, the whole model runs once on four tokens with every linear and every norm of the stream replaced by a stub that returns
random numbers of the right shape: no weight is read, and what becomes of every tensor can be watched call by call.
Whatever is not understood is refused.
"""

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from voroq.errors import VoroqError

TOKENS = 4
_ADD = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_SCALE = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__itruediv__"})
_SAME = frozenset({"to", "float", "double", "type_as", "contiguous", "clone", "detach", "dropout", "view", "reshape", "__getitem__"})
_BLANK = frozenset({"zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full", "to", "type_as"})
"""Calls that take no more than shape, dtype or device: from any argument, or (those in _SAME) from any but the first."""
_STORE = frozenset({"__setitem__", "__set__"})

Alteration = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Roles:
    """Names of modules. `norms`: offset of every norm of the stream (its gain is offset + weight); `readers`: the norm each reads."""

    width: int
    embeddings: tuple[str, ...]
    norms: dict[str, int]
    readers: dict[str, str]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class Tag:
    """What a tensor is: the sum of the outputs of `parts` (times numbers), or what the norm `norm` made of the stream."""

    parts: frozenset[str] = frozenset()
    norm: str | None = None


def find_roles(skeleton: nn.Module) -> Roles:
    """The roles in a model whose parameters are on meta. Raises VoroqError saying what stands in the way of a rotation."""
    return trace(skeleton).roles()


def trace(skeleton: nn.Module, altered: Mapping[str, Alteration] | None = None) -> "Trace":
    """Run a copy of `skeleton` on stubs; outputs of the linears in `altered` go through its functions first."""
    watch = Trace(copy.deepcopy(skeleton), altered or {})
    tokens = torch.arange(1, TOKENS + 1)[None]
    try:
        with torch.no_grad(), watch:
            output = watch.model(input_ids=tokens)
    except VoroqError:
        raise
    except Exception as error:  # the model's own code, on stubs: anything may be raised
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VoroqError(f"{type(skeleton).__name__} cannot be followed call by call ({line}); it cannot be rotated") from error
    watch.close(output)
    return watch


class Trace(TorchFunctionMode):
    """One run. `inputs` are what linears were called on, by name; afterwards only those of writers."""

    def __init__(self, model: nn.Module, altered: Mapping[str, Alteration]) -> None:
        super().__init__()
        self.model, self.kind = model, type(model).__name__
        self.altered = altered
        self.width = 0
        self.inputs: dict[str, Tensor] = {}
        self.norms: dict[str, int] = {}
        self.readers: dict[str, str] = {}
        self.writers: dict[str, None] = {}  # an ordered set
        self._embeddings: dict[str, Tensor] = {}
        self._linears: list[str] = []
        self._used: set[str] = set()
        self._tags: dict[int, tuple[Tensor, Tag]] = {}  # by identity; the tensor is kept so that its identity stays its own
        for name, module in model.named_modules():
            self._prepare(name, module)

    def roles(self) -> Roles:
        embeddings = tuple(name for name in self._embeddings if name in self.writers)
        return Roles(self.width, embeddings, self.norms, self.readers, tuple(name for name in self.writers if name not in embeddings))

    # ---- stubs ------------------------------------------------------------------------------------------------------

    def _prepare(self, name: str, module: nn.Module) -> None:
        """Give `module` a stub for its forward where it is a linear, an embedding or maybe a norm; give the others small weights."""
        if type(module) is nn.Linear:
            self._linears.append(name)
            module.forward = lambda x: self._linear(name, module, x)
            return
        if isinstance(module, nn.Embedding):  # its own forward runs (it may multiply by a number); see __torch_function__
            self._embeddings[name] = module.weight
            self.width = self.width or module.embedding_dim
            return
        parameters = dict(module.named_parameters(recurse=False))
        for leaf, parameter in parameters.items():
            if parameter.dim() > 1:
                raise self._refusal(f"{name}.{leaf} {list(parameter.shape)} belongs to a {type(module).__name__}, which is no nn.Linear")
            values = _noise(f"{name}.{leaf}", parameter.shape).abs() + 0.5
            module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        if parameters and not list(module.children()):
            forward = module.forward
            module.forward = lambda x, *more, **named: self._norm(name, module, forward, x, *more, **named)

    def _linear(self, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        if name in self.inputs:
            raise self._refusal(f"{name} is called more than once")
        self.inputs[name] = x
        tag = self._tag_of(x)
        if tag is not None and tag.norm is not None:
            self.readers[name] = tag.norm
        elif tag is not None:
            self._use(tag, f"{name}, without a norm")
        output = _noise(name, (*x.shape[:-1], module.out_features))
        return self._tag(self.altered.get(name, lambda same: same)(output), Tag(frozenset({name})))

    def _embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        name = next((name for name, weight in self._embeddings.items() if weight is table), None)
        if name is None:
            raise self._refusal("it embeds tokens by a table that is no nn.Embedding's")
        return self._tag(_noise(name, (*tokens.shape, table.shape[1])), Tag(frozenset({name})))

    def _norm(self, name: str, module: nn.Module, forward: Callable[..., Tensor], x: Tensor, *more: Any, **named: Any) -> Tensor:
        tag = self._tag_of(x)
        if tag is None or not self._is_stream(tag):
            return forward(x, *more, **named)
        if name in self.norms:
            raise self._refusal(f"{name} is called more than once")
        offset = _offset(module, forward, self.width)
        if offset is None:
            raise self._refusal(f"{name} ({type(module).__name__}) is no RMS norm; a rotation passes only through RMS norms")
        self.norms[name] = offset
        self.writers.update(dict.fromkeys(sorted(tag.parts - self.writers.keys())))
        return self._tag(_noise(name, x.shape), Tag(norm=name))

    # ---- calls ------------------------------------------------------------------------------------------------------

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.embedding:
            return self._embed(*args[:2])
        known = [(tensor, tag) for tensor in _tensors((args, kwargs)) if (tag := self._tag_of(tensor)) is not None]
        result = function(*args, **kwargs)
        name = function.__name__
        if known and (name in _STORE or any(True for _ in _tensors(result))):
            tag = self._outcome(name, args, result) if isinstance(result, Tensor) and args else None
            if tag is not None:
                self._tag(result, tag)
            elif name not in _BLANK or (name in _SAME and known[0][0] is args[0]):
                by = "an addition of what is no linear's output" if name in _ADD else f"the call {name}"
                for _, used in known:
                    self._use(used, by)
        return result

    def _outcome(self, name: str, args: tuple, result: Tensor) -> Tag | None:
        """What `result` is, where the call `name` keeps a sum a sum and a norm's output itself; else None."""
        tags = [self._tag_of(one) if isinstance(one, Tensor) else None for one in args]
        whole = all(one.shape[-1] == result.shape[-1] for one, tag in zip(args, tags, strict=True) if tag is not None)
        if not whole:
            return None
        if name in _ADD and len(args) == 2 and None not in tags and all(tag.norm is None for tag in tags):
            return Tag(tags[0].parts | tags[1].parts)
        if name in _SCALE and len(args) == 2:
            place = 0 if tags[0] is not None else 1
            other = args[1 - place]
            number = other.numel() == 1 if isinstance(other, Tensor) else isinstance(other, int | float)
            return tags[place] if number and (place == 0 or "div" not in name) else None
        if name in _SAME and tags[0] is not None and (name != "__getitem__" or _plain(args[1])):
            return tags[0]
        return None

    def _tag(self, tensor: Tensor, tag: Tag) -> Tensor:
        self._tags[id(tensor)] = (tensor, tag)
        return tensor

    def _tag_of(self, tensor: Tensor) -> Tag | None:
        return self._tags[id(tensor)][1] if id(tensor) in self._tags else None

    def _is_stream(self, tag: Tag) -> bool:
        return not tag.parts.isdisjoint(self._embeddings)

    def _use(self, tag: Tag, by: str) -> None:
        """Something that is no addition and no norm takes a tensor."""
        if tag.norm is not None:
            raise self._refusal(f"{by} reads the output of {tag.norm}, which only linears may read")
        if self._is_stream(tag):
            raise self._refusal(f"the residual stream goes into {by}; only norms may read it and only linears be added to it")
        self._used |= tag.parts

    def close(self, output: Mapping[str, Any]) -> None:
        """Refuse what shows only at the end of the run, and let go of what is not needed after it."""
        for tensor in _tensors(output):
            tag = self._tag_of(tensor)
            if tag is not None and (tag.norm is not None or self._is_stream(tag)):
                raise self._refusal("it returns the residual stream itself; give a model with a head")
        idle = [name for name in self._linears if name not in self.inputs]
        if idle:
            raise self._refusal(f"{idle[0]} is not called on plain text")
        unread = self.norms.keys() - set(self.readers.values())
        if unread or not self.norms:
            raise self._refusal(f"no linear reads {min(unread)}" if unread else "no norm reads its residual stream")
        shared = self.writers.keys() & self._used
        if shared:
            raise self._refusal(f"{min(shared)} is added to the residual stream and used elsewhere too")
        self._tags.clear()
        self.inputs = {name: x for name, x in self.inputs.items() if name in self.writers}

    def _refusal(self, reason: str) -> VoroqError:
        return VoroqError(f"{self.kind} cannot be rotated: {reason}")


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _plain(key: Any) -> bool:
    """Whether indexing with `key` only picks tokens, in order."""
    return all(isinstance(part, slice | int | type(...) | None) for part in (key if isinstance(key, tuple) else (key,)))


def _noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers that depend on the name alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)


def _offset(norm: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> int | None:
    """0 if `norm` is x -> x / rms(x) * weight, 1 if it is x / rms(x) * (1 + weight), else None; by trying.

    For two x of equal length, output / x / gain must be one and the same number everywhere.
    """
    if [tuple(parameter.shape) for parameter in norm.parameters()] != [(width,)]:
        return None
    x = torch.nn.functional.normalize(_noise("x", (2, width)), dim=-1) * width**0.5
    (weight,) = norm.parameters()
    for offset in (0, 1):
        scale = forward(x) / x / (weight + offset)
        if bool((scale / scale[0, 0] - 1).abs().max() < 1e-4):
            return offset
    return None
