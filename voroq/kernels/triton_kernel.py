"""y = x @ w.T on CUDA without building w, by Triton. Tables, grids and pyramids, words down the output or along the input.

What specs need is found once and kept (`triton_plan`); a call looks up its tensors by name, launches, and holds nothing: CUDA graphs can
capture it after one call outside. Launches: `arrange` if x must be reordered or scaled, one product, `collect` if there are several slices,
for one linear as for several that read the same x (`matmuls`). All sums in float32, in a fixed order.

Triton is imported at the first product. With TRITON_INTERPRET=1 in the environment it interprets kernels on the CPU, very slowly: for
tests, and only if VOROQ_KERNEL=triton asks for it.
"""

import os
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.kernels.triton_form import THIN, Form, batch_class, pieces
from voroq.kernels.triton_plan import BLOCK, Plan, Source, plan
from voroq.packed.base import Packed, Spec
from voroq.packed.native_format import NativeSpec

REALS = (torch.float32, torch.float16, torch.bfloat16)
MOST = 1024
"""Rows of x multiplied at a time, so that slices stay small."""
OLDEST = (3, 8)
"""Of Triton: the compilers before take constants that are tuples apart, and fail."""


def supports(spec: Spec, x: Float[Tensor, "*batch in"]) -> bool:
    return x.dtype in REALS and _runs_on(x.device) and pieces(spec) is not None


def matmul(x: Float[Tensor, "*batch in"], packed: Packed) -> Float[Tensor, "*batch out"]:
    return matmuls(x, [packed])[0]


def matmuls(x: Float[Tensor, "*batch in"], linears: list[Packed]) -> list[Tensor]:
    """`matmul` with each of `linears`, bit for bit, in the launches of one."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    specs, tensors = [each.spec for each in linears], [_contiguous(each.tensors) for each in linears]
    turned = any(_inside(spec) for spec in specs)
    found = _turned(flat, specs, tensors) if turned else _multiply([flat] * len(specs), specs, tensors)
    return found if x.dim() == 2 else [y.reshape(*x.shape[:-1], y.shape[1]) for y in found]


def _turned(x: Float[Tensor, "n in"], specs: list[Spec], tensors: list[dict[str, Tensor]]) -> list[Tensor]:
    """The products, with the rotations and scales of native specs around them, done by torch: first all of x, then all of y."""
    inputs, inner, found = [], [], {}

    def enter(place: int) -> None:
        if place == len(specs):
            inner.extend(_multiply(inputs, [_inside(spec) or spec for spec in specs], tensors))
            return

        def between(turned: Tensor) -> Tensor:
            inputs.append(turned.contiguous())
            enter(place + 1)
            return inner[place]

        if _inside(specs[place]):
            found[place] = specs[place].transform(tensors[place]).linear(x.float(), between).to(x.dtype)
        else:
            found[place] = between(x)

    enter(0)
    return [found[place] for place in range(len(specs))]


@lru_cache(maxsize=1024)
def _inside(spec: Spec) -> NativeSpec | None:
    """What is left of a spec within operations of torch around the kernels; None if it has none."""
    return replace(spec, steps=()) if isinstance(spec, NativeSpec) and set(spec.steps) - {"permute"} else None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _multiply(inputs: list[Tensor], specs: list[Spec], tensors: list[dict[str, Tensor]]) -> list[Tensor]:
    """x @ w.T for every x [n in] and its linear."""
    n, device = inputs[0].shape[0], inputs[0].device
    outputs = [torch.empty(n, spec.shape[0], dtype=x.dtype, device=device) for x, spec in zip(inputs, specs, strict=True)]
    known = tuple(specs), tuple(x.dtype for x in inputs)
    with torch.cuda.device_of(inputs[0]):  # where Triton launches
        for first in range(0, n, MOST):
            own = slice(first, first + MOST)
            found = plan(*known, batch_class(min(MOST, n - first)), *_device(device))
            _part([x[own] for x in inputs], [y[own] for y in outputs], tensors, found)
    return outputs


def _part(inputs: list[Tensor], outputs: list[Tensor], tensors: list[dict[str, Tensor | None]], plan: Plan) -> None:
    """All outputs written. A tensor that a linear has not got is None."""
    from voroq.kernels import triton_product as product  # imports triton

    (batch, columns), blocks, device = inputs[0].shape, -(-inputs[0].shape[1] // BLOCK), inputs[0].device
    thin, ordered, dots, into = batch <= THIN, [], [], []
    for x, y, member in zip(inputs, outputs, plan.members, strict=True):
        ordered.append(torch.empty(x.shape, dtype=torch.float32 if thin else x.dtype, device=device) if member.moved else x)
        dots.append(torch.empty((batch, blocks), dtype=torch.float32, device=device) if member.dots else None)
        into.append(y if member.alone else torch.empty((member.slices, *y.shape), dtype=torch.float32, device=device))

    if plan.arranged:
        taken = []
        for i in plan.arranged:
            member, get = plan.members[i], tensors[i].get
            taken.append((inputs[i], ordered[i] if member.moved else None, dots[i], get(member.perm), *map(get, member.arranging)))
        product.arrange[(blocks * len(taken), batch)](tuple(taken), batch, columns, BLOCK)

    for launch in plan.launches:
        taken = []
        for source in launch.sources:
            i, get = source.linear, tensors[source.linear].get
            codes, main, second, *rest = map(get, source.names)
            if source.narrow is not None:
                main, second = _wide(main, source.narrow), _wide(second, source.narrow)
            behind = () if thin else (get(plan.members[i].perm), *map(get, plan.members[i].columns))
            taken.append((ordered[i], into[i], codes, main, second, *rest, _book(source, device), *behind))
        if thin:
            product.thin[(launch.parts[-1].end,)](tuple(taken), batch, launch.parts, **launch.options)
        else:
            grid = launch.parts[-1].end, -(-batch // launch.rows)
            product.wide[grid](tuple(taken), batch, launch.parts, interpreted(), **launch.options)

    if plan.collected:
        taken = tuple((into[i], outputs[i], dots[i], *map(tensors[i].get, plan.members[i].rows)) for i in plan.collected)
        product.collect[(plan.sums[-1].end, batch)](taken, batch, plan.sums, blocks, BLOCK)


def _wide(table: Tensor | None, form: Form) -> Tensor | None:
    """`table` with every word filled up to a power of two."""
    from voroq.kernels.triton_tables import widen

    if table is None:
        return None
    rows = table.numel() // form.size
    wide = torch.empty(rows, form.wide, dtype=table.dtype, device=table.device)
    widen[(-(-wide.numel() // BLOCK),)](table, wide, rows, form.size, form.wide, BLOCK)
    return wide


def _book(source: Source, device: torch.device) -> Tensor | None:
    from voroq.kernels.triton_pyramids import book

    return book(source.size, source.pulses, device) if source.pulses else None


@cache
def _device(device: torch.device) -> tuple[str, int]:
    """Name and multiprocessors."""
    if device.type != "cuda":
        return device.type, 2
    return torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).multi_processor_count


def _runs_on(device: torch.device) -> bool:
    return (device.type == "cuda" or (device.type == "cpu" and interpreted())) and _installed()


def interpreted() -> bool:
    """Whether Triton is to interpret kernels on the CPU, which must be asked for twice."""
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("VOROQ_KERNEL") == "triton"


@cache
def _installed() -> bool:
    if find_spec("triton") is None:
        return False
    import triton

    return recent(triton.__version__)


def recent(version: str) -> bool:
    return tuple(int(number) for number in version.split(".")[:2]) >= OLDEST
