"""Linears that read the same input, multiplied together: `why_not = share(model)`.

q, k and v, or gate and up, take one set of launches instead of three or two. No list of architectures says which linears those are: a
trial run of the model does, in which they receive the very same tensor. From then on the first of them computes all, and another takes
its result only for that tensor, unchanged, in the same thread, stream and mode of autograd; else it computes its own, as before. So
whatever a model does, results are those of separate calls, and no product is made more than twice.

What waits to be taken is dropped with the tensor it was made of. Copies of a linear are on their own until `share` is called again. Under
`torch.inference_mode` tensors do not tell whether they were changed, and nothing is shared.
"""

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from voroq.kernels import linears, pick
from voroq.layer import QuantLinear


def share(model: nn.Module) -> str | None:
    """Let those linears of `model` that read the same input be multiplied together where kernels can. None, or why none are."""
    try:
        tokens = torch.arange(3, device=model.get_input_embeddings().weight.device)[None]
        found = siblings(model, lambda: model(input_ids=tokens, use_cache=False))
    except Exception as problem:  # of a model's own code anything may come
        return f"a trial run of three tokens failed ({type(problem).__name__}: {problem})"
    for members in found:
        join(members)
    return None if found else "no two of its linears read one input and have kernels that multiply them together"


def siblings(model: nn.Module, run: Callable[[], object]) -> list[tuple[QuantLinear, ...]]:
    """Those that receive one tensor in `run()`, each called once, in the order of their calls. What was shared before no longer is.

    During the run their products are zeros.
    """
    quantized = [m for m in model.modules() if isinstance(m, QuantLinear) and m.activations is None]
    calls: list[tuple[QuantLinear, Tensor, int]] = []

    def watch(module: QuantLinear, x: Tensor) -> Tensor:
        calls.append((module, x, x._version))  # x is kept: no other may get its id
        return x.new_zeros(*x.shape[:-1], module.out_features)

    for module in quantized:
        module.together = watch
    try:
        with torch.inference_mode(False), torch.no_grad():
            run()
    finally:
        for module in quantized:
            module.together = None
    times, found = Counter(module for module, _, _ in calls), {}
    for module, x, version in calls:
        if times[module] == 1 and pick(module.spec, x) == "triton":
            found.setdefault((id(x), version), []).append(module)
    return [tuple(members) for members in found.values() if len(members) > 1]


def join(members: tuple[QuantLinear, ...]) -> None:
    """Let the first of `members` compute all of them."""
    group = Group(members)
    for module in members:
        module.together = group


class Held(NamedTuple):
    """Results that wait: of which tensor, in which state, by place among the members."""

    x: weakref.ref
    state: tuple[Any, ...]
    results: dict[int, Tensor]


class Group:
    """Members, and what was computed for them. A copy, or what is read back from a file, is None."""

    def __init__(self, members: tuple[QuantLinear, ...]) -> None:
        self.members, self.here, self.traced = members, threading.local(), None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __call__(self, module: QuantLinear, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        place = next((i for i, each in enumerate(self.members) if each is module), None)
        if place is None or type(x) is not Tensor:
            return module.product(x)
        if torch.compiler.is_compiling():
            return self._in_a_graph(place, x)
        if x.is_inference():
            return module.product(x)
        return self._later(place, x) if place else self._first(x)

    def _first(self, x: Tensor) -> Tensor:
        own, *others = self._products(x)
        results = dict(enumerate(others, start=1))
        self.here.held = Held(weakref.ref(x, lambda _: results.clear()), _state(x), results)
        return own

    def _later(self, place: int, x: Tensor) -> Tensor:
        held: Held | None = getattr(self.here, "held", None)
        waits = held is not None and held.x() is x and held.state == _state(x)
        found = held.results.pop(place, None) if waits else None
        return self.members[place].product(x) if found is None else found

    def _in_a_graph(self, place: int, x: Tensor) -> Tensor:
        """The same while a graph is recorded: `traced` is filled by the first member and emptied by the last, and so is none in between.

        The first never looks at it, so that what a graph that called only some of them left there makes no other graph.
        """
        state = torch.ops.voroq.stamp(x).shape[0], x.requires_grad, torch.is_grad_enabled()
        if place == 0:
            results = self._products(x)
            self.traced = state, results
            return results[0]
        traced = self.traced
        if place + 1 == len(self.members):
            self.traced = None
        if traced is None or traced[0] != state or place >= len(traced[1]):
            return self.members[place].product(x)
        return traced[1][place]

    def _products(self, x: Tensor) -> list[Tensor]:
        """Of all members, or of the first alone where not all weights are where x is: offloaded, or moved."""
        operands = [each.operands() for each in self.members]
        tensors = [tensor for own, _ in operands for tensor in own]
        if any(tensor.device != x.device for tensor in tensors):
            return [self.members[0].product(x)]
        return linears(x, tensors, "\n".join(key for _, key in operands))


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must not have changed for a result to be the one that would be computed now."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    return x._version, x.requires_grad, torch.is_grad_enabled(), stream


@torch.library.custom_op("voroq::stamp", mutates_args=())
def _stamp(x: Tensor) -> Tensor:
    """Empty. But while a graph is recorded, of a length that no other tensor of any graph has, nor `x` once it is changed.

    There alone a tensor's version can be asked for without making it a number of the graph. Nothing uses the result: it is not computed.
    """
    return x.new_empty(0)


@_stamp.register_fake
def _(x: Tensor) -> Tensor:
    version, (known, length) = None if x.is_inference() else x._version, _LENGTHS.get(x, (None, 0))
    if version is None or version != known:
        length = next(_NEXT)
        _LENGTHS[x] = version, length
    return x.new_empty(length)


_NEXT, _LENGTHS = itertools.count(1), WeakIdKeyDictionary()
