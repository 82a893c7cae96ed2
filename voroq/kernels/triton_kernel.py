"""y = x @ w.T on CUDA without building w, by Triton. Tables, grids and pyramids, words down the output or along the input.

What a spec needs is found once and kept (`triton_form`); a call looks up its tensors by name, launches, and holds nothing: CUDA graphs can
capture it after one call outside. Launches: `arrange` if x must be reordered or scaled, one product, `collect` if there are several slices,
for one linear as for several that read the same x (`matmuls`). All sums in float32, in a fixed order.

Triton is imported at the first product. With TRITON_INTERPRET=1 in the environment it interprets kernels on the CPU, very slowly: for
tests, and only if VOROQ_KERNEL=triton asks for it.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.kernels.triton_form import THIN, Form, Part, Piece, Sum, Tiling, batch_class, pieces, tiling
from voroq.packed.base import Packed, Spec
from voroq.packed.native_format import NativeSpec

REALS = (torch.float32, torch.float16, torch.bfloat16)
MOST = 1024
"""Rows of x multiplied at a time, so that slices stay small."""
WORTH = 1 << 20
"""Words of a matrix from which on tables of odd vector lengths are filled up first, to be read in whole words."""
OLDEST = (3, 8)
"""Of Triton: the compilers before take constants that are tuples apart, and fail."""
BLOCK = 1024
"""Columns or rows of a program that does not decode."""


def supports(spec: Spec, x: Float[Tensor, "*batch in"]) -> bool:
    return x.dtype in REALS and _runs_on(x.device) and pieces(spec) is not None


def matmul(x: Float[Tensor, "*batch in"], packed: Packed) -> Float[Tensor, "*batch out"]:
    return matmuls(x, [packed])[0]


def matmuls(x: Float[Tensor, "*batch in"], linears: list[Packed]) -> list[Tensor]:
    """`matmul` with each of `linears`, bit for bit, in the launches of one."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    own = [Packed(each.spec, {name: tensor.contiguous() for name, tensor in each.tensors.items()}) for each in linears]
    return [y.reshape(*x.shape[:-1], y.shape[1]) for y in _turned(flat, own)]


def _turned(x: Float[Tensor, "n in"], linears: list[Packed]) -> list[Tensor]:
    """The products, with the rotations and scales of native specs around them, done by torch: first all of x, then all of y."""
    inside, inputs, inner, found = list(linears), [], [], {}

    def enter(place: int) -> None:
        if place == len(linears):
            inner.extend(_multiply(inputs, inside))
            return
        spec, tensors = linears[place].spec, linears[place].tensors

        def between(turned: Tensor) -> Tensor:
            inputs.append(turned.contiguous())
            enter(place + 1)
            return inner[place]

        if isinstance(spec, NativeSpec) and set(spec.steps) - {"permute"}:
            inside[place] = Packed(replace(spec, steps=()), tensors)
            found[place] = spec.transform(tensors).linear(x.float(), between).to(x.dtype)
        else:
            found[place] = between(x)

    enter(0)
    return [found[place] for place in range(len(linears))]


def _multiply(inputs: list[Tensor], linears: list[Packed]) -> list[Tensor]:
    """x @ w.T for every x [n in] and its linear."""
    outputs = [torch.empty(x.shape[0], each.spec.shape[0], dtype=x.dtype, device=x.device) for x, each in zip(inputs, linears, strict=True)]
    with torch.cuda.device_of(inputs[0]):  # where Triton launches
        for first in range(0, inputs[0].shape[0], MOST):
            part = slice(first, first + MOST)
            _part([Member(each, x[part], y[part]) for x, y, each in zip(inputs, outputs, linears, strict=True)])
    return outputs


class Member:
    """A linear, `x`, and `y`, where their product goes: what must be known of it before, between and behind the kernels' launches."""

    def __init__(self, packed: Packed, x: Float[Tensor, "n in"], y: Float[Tensor, "n out"]) -> None:
        self.tensors, self.x, self.y, thin = packed.tensors, x, y, x.shape[0] <= THIN
        self.perm, scale, shift, by_row = _basis(packed.spec, packed.tensors)
        self.of_columns, self.of_rows = ((None, None), (scale, shift)) if by_row else ((scale, shift), (None, None))
        self.dots = _floats(x, x.shape[0], -(-x.shape[1] // BLOCK)) if by_row or (thin and shift is not None) else None
        self.scaling = self.of_columns if thin else (None, None)
        moved = self.perm is not None or self.scaling[0] is not None
        self.ordered = torch.empty(x.shape, dtype=torch.float32 if thin else x.dtype, device=x.device) if moved else x
        self.pieces = [(piece, _tiling(piece, x)) for piece in pieces(packed.spec)]
        self.slices = sum(cut.splits for _, cut in self.pieces)
        self.alone = self.slices == 1 and self.dots is None
        self.into = y if self.alone else _floats(x, self.slices, *y.shape)

    def arranging(self) -> tuple[Tensor | None, ...]:
        return self.x, None if self.ordered is self.x else self.ordered, self.dots, self.perm, *self.scaling

    def parts(self) -> Iterator[tuple[tuple[Tensor | None, ...], Part]]:
        """Every piece: its tensors, and what is constant of it (from program 0)."""
        first = 0
        for piece, cut in self.pieces:
            form, (codes, main, second, *rest) = piece.form, (self.tensors[name] if name else None for name in piece.names)
            short = second is not None and self.x.dtype == main.dtype == torch.float16  # one rounding, as that to the type of x would be
            if _worth_widening(form):
                main, second, form = _wide(main, form), _wide(second, form), form.widened()
            tensors = self.ordered, self.into, codes, main, second, *rest, _book(piece, self.x.device)
            yield tensors, Part(form, cut, first, short, 0, -(-form.down // cut.rows) * cut.splits)
            first += cut.splits


def _part(members: list[Member]) -> None:
    """All y written. Pieces whose tilings agree in all that a launch has only one of, share one."""
    from voroq.kernels import triton_product as product  # imports triton

    batch, columns = members[0].x.shape
    moved = [each.arranging() for each in members if each.ordered is not each.x or each.dots is not None]
    if moved:
        product.arrange[(-(-columns // BLOCK) * len(moved), batch)](tuple(moved), batch, columns, BLOCK)

    launches: dict[tuple[int, ...], list[tuple[tuple[Tensor | None, ...], Part]]] = {}
    for each in members:
        for tensors, part in each.parts():
            if batch > THIN:
                tensors = *tensors, each.perm, *each.of_columns
            launches.setdefault((part.tiling.batch, part.tiling.warps, part.tiling.stages), []).append((tensors, part))
    for (rows, warps, stages), found in launches.items():
        tensors, parts, programs = tuple(t for t, _ in found), _in_turn([part for _, part in found]), sum(part.end for _, part in found)
        known = {"num_warps": warps, "num_stages": stages}
        if batch <= THIN:
            product.thin[(programs,)](tensors, batch, parts, **known)
        else:
            product.wide[(programs, -(-batch // rows))](tensors, batch, parts, interpreted(), **known)

    rest = [each for each in members if not each.alone]
    if rest:
        sums = _in_turn([Sum(each.y.shape[1], each.slices, 0, -(-each.y.shape[1] // BLOCK)) for each in rest])
        tensors = tuple((each.into, each.y, each.dots, *each.of_rows) for each in rest)
        product.collect[(sums[-1].end, batch)](tensors, batch, sums, -(-columns // BLOCK), BLOCK)


def _in_turn(parts: list[Part] | list[Sum]) -> tuple[Part | Sum, ...]:
    """Numbers of programs one behind the other, where each counted from 0."""
    ends = list(accumulate(part.end for part in parts))
    return tuple(part._replace(first=end - part.end, end=end) for part, end in zip(parts, ends, strict=True))


def _worth_widening(form: Form) -> bool:
    return form.kind == "table" and form.entry != form.wide and form.down * form.along * form.groups >= WORTH


def _wide(table: Tensor | None, form: Form) -> Tensor | None:
    """`table` with every word filled up to a power of two."""
    from voroq.kernels.triton_tables import widen

    if table is None:
        return None
    rows = table.numel() // form.size
    wide = torch.empty(rows, form.wide, dtype=table.dtype, device=table.device)
    widen[(-(-wide.numel() // BLOCK),)](table, wide, rows, form.size, form.wide, BLOCK)
    return wide


def _basis(spec: Spec, tensors: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """Permutation, scale and shift, and whether these are of rows; of native specs only the permutation, the rest is done outside."""
    if isinstance(spec, NativeSpec):
        return tensors["weight_perm"] if "permute" in spec.steps else None, None, None, False
    scale, shift = (tensors[name] if spec.norm else None for name in ("weight_scale", "weight_bias"))
    return tensors["perm"] if spec.perm else None, scale, shift, spec.norm and spec.norm_dim == 1


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _tiling(piece: Piece, x: Tensor) -> Tiling:
    return tiling(piece.form, batch_class(x.shape[0]), *_device(x.device))


def _book(piece: Piece, device: torch.device) -> Tensor | None:
    from voroq.kernels.triton_pyramids import book

    return book(piece.form.size, piece.pulses, device) if piece.pulses else None


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
