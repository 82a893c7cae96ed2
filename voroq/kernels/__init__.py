"""Products with packed weights. `linear` takes the first entry of KERNELS that supports the spec and the input.

Where gradients or graphs are recorded it is the operator `voroq::linear`, which torch.compile sees as one step; its gradient is that of
`x`. Else the kernel is called directly. The environment variable VOROQ_KERNEL forces one by name. `linears` and `voroq::linears` are the
same for several linears that read one input.
"""

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.errors import VoroqError
from voroq.kernels import cpu, reference, triton_kernel
from voroq.packed.base import Packed, Spec
from voroq.packed.format import spec_from_json

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton_kernel, "reference": reference}
"""Fastest first; `reference` is last and supports everything."""
VARIABLE = "VOROQ_KERNEL"


def key_of(spec: Spec) -> str:
    """`spec` as operators take it and graphs keep it, a string: its layout and its entry in config.json."""
    return json.dumps([spec.method, spec.to_json()])


@lru_cache(maxsize=4096)
def described(key: str) -> tuple[Spec, tuple[str, ...]]:
    """The spec of a key, and the names of its tensors."""
    layout, entry = json.loads(key)
    spec = spec_from_json(layout, entry, "voroq::linear")
    return spec, tuple(stored.name for stored in spec.layout())


def matmul(x: Float[Tensor, "*batch in"], packed: Packed) -> Float[Tensor, "*batch out"]:
    """`x @ w.T` for the linear w [out in] stored as `packed`, in the type of `x`."""
    key = key_of(packed.spec)
    return linear(x, [packed.tensors[name] for name in described(key)[1]], key)


def linear(x: Float[Tensor, "*batch in"], tensors: list[Tensor], key: str) -> Float[Tensor, "*batch out"]:
    """`matmul` for the spec of a key; `tensors` are in the order of its layout."""
    if torch.compiler.is_compiling() or x.requires_grad or type(x) is not Tensor:
        return torch.ops.voroq.linear(x, tensors, key)
    return _forward(x, tensors, key)


def matmuls(x: Float[Tensor, "*batch in"], several: list[Packed]) -> list[Tensor]:
    """`matmul` with each of `several`, bit for bit; those of Triton share launches."""
    keys = [key_of(packed.spec) for packed in several]
    named = zip(several, (described(key)[1] for key in keys), strict=True)
    return linears(x, [packed.tensors[name] for packed, names in named for name in names], "\n".join(keys))


def linears(x: Float[Tensor, "*batch in"], tensors: list[Tensor], keys: str) -> list[Tensor]:
    """`matmuls` for the specs of `keys`, one a line; `tensors` are those of the first, of the second, and so on."""
    if torch.compiler.is_compiling() or x.requires_grad or type(x) is not Tensor:
        return torch.ops.voroq.linears(x, tensors, keys)
    return _forwards(x, tensors, keys)


def pick(spec: Spec, x: Float[Tensor, "*batch in"]) -> str:
    """The name of the kernel that multiplies `x` with a linear of `spec`. Raises VoroqError when VOROQ_KERNEL names none that can."""
    forced = os.environ.get(VARIABLE)
    if not forced:
        return next(name for name, kernel in KERNELS.items() if kernel.supports(spec, x))
    if forced not in KERNELS:
        raise VoroqError(f"{VARIABLE}={forced!r} is unknown; choose one of {', '.join(KERNELS)}, or unset it")
    if not KERNELS[forced].supports(spec, x):
        what = f"{spec.shape[0]} x {spec.shape[1]} weights with inputs of {x.dtype} on {x.device}"
        raise VoroqError(f"{VARIABLE}={forced} cannot multiply a {spec.method} layout of {what}; unset it (see voroq doctor)")
    return forced


def _forward(x: Tensor, tensors: list[Tensor], key: str) -> Tensor:
    packed = _packed(tensors, key)
    return KERNELS[pick(packed.spec, x)].matmul(x, packed)


def _forwards(x: Tensor, tensors: list[Tensor], keys: str) -> list[Tensor]:
    each = [_packed(own, key) for own, key in _split(tensors, keys)]
    names = [pick(packed.spec, x) for packed in each]
    if set(names) == {"triton"}:
        return triton_kernel.matmuls(x, each)
    return [KERNELS[name].matmul(x, packed) for name, packed in zip(names, each, strict=True)]


def _split(tensors: list[Tensor], keys: str) -> Iterator[tuple[list[Tensor], str]]:
    """The tensors of every key, and the key."""
    first = 0
    for key in keys.split("\n"):
        count = len(described(key)[1])
        yield tensors[first : first + count], key
        first += count


def _packed(tensors: list[Tensor], key: str) -> Packed:
    spec, names = described(key)
    return Packed(spec, dict(zip(names, tensors, strict=True)))


@torch.library.custom_op("voroq::linear", mutates_args=())
def _linear(x: Tensor, tensors: list[Tensor], key: str) -> Tensor:
    return _forward(x.detach(), tensors, key)


@_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], key: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], described(key)[0].shape[0]))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor | list[Tensor]) -> None:
    _, tensors, ctx.key = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> tuple[Tensor, list[None], None]:
    tensors = list(ctx.saved_tensors)
    return torch.ops.voroq.transposed(above, tensors, ctx.key), [None] * len(tensors), None


_linear.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("voroq::transposed", mutates_args=())
def _transposed(y: Tensor, tensors: list[Tensor], key: str) -> Tensor:
    """y @ w: the gradient of `linear` to its input."""
    return y @ reference.weight(_packed(tensors, key), y.dtype)


@_transposed.register_fake
def _(y: Tensor, tensors: list[Tensor], key: str) -> Tensor:
    return y.new_empty((*y.shape[:-1], described(key)[0].shape[1]))


@torch.library.custom_op("voroq::linears", mutates_args=())
def _linears(x: Tensor, tensors: list[Tensor], keys: str) -> list[Tensor]:
    return _forwards(x.detach(), tensors, keys)


@_linears.register_fake
def _(x: Tensor, tensors: list[Tensor], keys: str) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], described(key)[0].shape[0])) for key in keys.split("\n")]


def _gradients(ctx: torch.autograd.function.FunctionCtx, above: list[Tensor]) -> tuple[Tensor, list[None], None]:
    tensors = list(ctx.saved_tensors)
    parts = [torch.ops.voroq.transposed(y, own, key) for y, (own, key) in zip(above, _split(tensors, ctx.key), strict=True)]
    return sum(parts[1:], start=parts[0]), [None] * len(tensors), None


_linears.register_autograd(_gradients, setup_context=_save)
