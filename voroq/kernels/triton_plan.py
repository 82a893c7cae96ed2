"""What a product with linears of given specs launches: found once for a class of batches, and kept. Names and constants, no tensors."""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from voroq.kernels.triton_form import THIN, Form, Tiling, pieces, tiling
from voroq.packed.base import Spec
from voroq.packed.native_format import NativeSpec

WORTH = 1 << 20
"""Words of a matrix from which on tables of odd vector lengths are filled up first, to be read in whole words."""
BLOCK = 1024
"""Columns or rows of a program that does not decode."""

Pair = tuple[str | None, str | None]
"""Names of a scale and a shift."""


class Part(NamedTuple):
    """A piece in a launch of several: programs `first` to `end` are its own, and write its slices from `slice` on.

    `short`: x is in float16, and so tables in float16 are added in that type.
    """

    form: Form
    tiling: Tiling
    slice: int
    short: bool
    first: int
    end: int


class Sum(NamedTuple):
    """A linear of `out` rows in a launch that adds up the slices of several: programs `first` to `end` are its own."""

    out: int
    slices: int
    first: int
    end: int


class Member(NamedTuple):
    """How a linear takes x and gives y: `moved` if x is copied in another order or scaled, `dots` if products of x with a shift, or sums of
    x, are made; `alone` if its one slice is y itself. `arranging` scales x, `columns` decoded weights, `rows` sums."""

    perm: str | None
    arranging: Pair
    columns: Pair
    rows: Pair
    moved: bool
    dots: bool
    slices: int
    alone: bool


class Source(NamedTuple):
    """Where a piece's tensors come from: which of the linears, by which names; as what its tables are first filled up; its pyramids."""

    linear: int
    names: tuple[str | None, ...]
    narrow: Form | None
    size: int
    pulses: tuple[int, ...]


class Launch(NamedTuple):
    """Pieces whose tilings agree in all that a launch has only one of: rows of x, `options` for the compiler."""

    rows: int
    options: dict[str, int]
    sources: tuple[Source, ...]
    parts: tuple[Part, ...]


class Plan(NamedTuple):
    """`arranged` and `collected` are places of linears."""

    members: tuple[Member, ...]
    arranged: tuple[int, ...]
    launches: tuple[Launch, ...]
    collected: tuple[int, ...]
    sums: tuple[Sum, ...]


@lru_cache(maxsize=4096)
def plan(specs: tuple[Spec, ...], types: tuple[torch.dtype, ...], batch: int, device: str, units: int) -> Plan:
    """For linears of `specs` with inputs of `types`, and batches of the class `batch`."""
    members, found = [], {}
    for place, (spec, dtype) in enumerate(zip(specs, types, strict=True)):
        first = 0
        for piece in pieces(spec):
            form, cut = piece.form, tiling(piece.form, batch, device, units)
            narrow = form if _worth_widening(form) else None
            short = form.bits2 > 0 and dtype == torch.float16
            part = Part(form.widened() if narrow else form, cut, first, short, 0, -(-form.down // cut.rows) * cut.splits)
            source = Source(place, piece.names, narrow, form.size, piece.pulses)
            found.setdefault((cut.batch, cut.warps, cut.stages), []).append((source, part))
            first += cut.splits
        members.append(_member(spec, batch <= THIN, first))
    launches = [
        Launch(rows, {"num_warps": warps, "num_stages": stages}, tuple(s for s, _ in own), _in_turn([p for _, p in own]))
        for (rows, warps, stages), own in found.items()
    ]
    arranged = tuple(place for place, own in enumerate(members) if own.moved or own.dots)
    collected = tuple(place for place, own in enumerate(members) if not own.alone)
    sums = [Sum(specs[place].shape[0], members[place].slices, 0, -(-specs[place].shape[0] // BLOCK)) for place in collected]
    return Plan(tuple(members), arranged, tuple(launches), collected, _in_turn(sums))


def _member(spec: Spec, thin: bool, slices: int) -> Member:
    """Of native specs only the permutation is looked at; the rest is done around the kernels."""
    if isinstance(spec, NativeSpec):
        perm, affine, by_row = "weight_perm" if "permute" in spec.steps else None, (None, None), False
    else:
        perm, by_row = "perm" if spec.perm else None, spec.norm and spec.norm_dim == 1
        affine = ("weight_scale", "weight_bias") if spec.norm else (None, None)
    columns, rows = ((None, None), affine) if by_row else (affine, (None, None))
    arranging = columns if thin else (None, None)
    dots = by_row or (thin and affine[1] is not None)
    return Member(perm, arranging, columns, rows, perm is not None or arranging[0] is not None, dots, slices, slices == 1 and not dots)


def _worth_widening(form: Form) -> bool:
    return form.kind == "table" and form.entry != form.wide and form.down * form.along * form.groups >= WORTH


def _in_turn(parts: list[Part] | list[Sum]) -> tuple[Part | Sum, ...]:
    """Numbers of programs one behind the other, where each counted from 0."""
    ends = accumulate(part.end for part in parts)
    return tuple(part._replace(first=end - part.end, end=end) for part, end in zip(parts, ends, strict=True))
