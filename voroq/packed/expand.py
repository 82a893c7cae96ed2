"""Pyramids spelled out: the same weights, more memory, nothing left to decode but integers times scales.

A number of b bits becomes its level and d integers of 4 bits, where all of a linear's fit, or of 8. Tables, grids and the paper's
gains stay as they are.
"""

from dataclasses import replace

from jaxtyping import Int
from torch import Tensor, cat

from voroq.codebook.pyramid import Pyramids
from voroq.packed.base import Packed
from voroq.packed.codebooks import MAX_ENTRY, PulsesForm, PyramidsForm
from voroq.packed.format import unpack
from voroq.packed.native_format import NativeSpec, Run

PART = 1 << 18
"""Codes spelled out at once."""


def can_expand(spec: object) -> bool:
    """Whether `expanded` changes anything: all bands of the linear are pyramids whose entries fit into bytes."""
    return isinstance(spec, NativeSpec) and all(_expandable(run) for run in spec.runs)


def expanded(packed: Packed) -> Packed:
    """`packed` with pulses in place of numbers, where `can_expand`; it means the same weight to the bit."""
    spec = packed.spec
    if not can_expand(spec):
        return packed
    q = unpack(packed)
    codes = tuple(_spelled(band.codebook, part) for band, part in zip(q.bands, q.codes, strict=True))
    q = replace(q, bands=tuple(replace(band, codebook=band.codebook.spelled) for band in q.bands), codes=codes)
    dtype = next(packed.tensors[stored.name].dtype for stored in spec.layout() if stored.real)
    largest = max(int((part[..., 1:] - max(band.codebook.pulses)).abs().max()) for band, part in zip(q.bands, q.codes, strict=True))
    runs = [replace(run, form=PulsesForm(run.form.dim, run.form.pulses, 4 if largest < 8 else 8)) for run in spec.runs]
    made = replace(spec, runs=tuple(runs))
    return Packed(made, made.pack(q, dtype))


def _expandable(run: Run) -> bool:
    return isinstance(run.form, PyramidsForm) and max(run.form.pulses) <= MAX_ENTRY and run.form.dim % 2 == 0


def _spelled(book: Pyramids, codes: Int[Tensor, "rows cols s"]) -> Int[Tensor, "rows cols t"]:
    flat = codes.flatten(0, 1)
    return cat([book.spell(part) for part in flat.split(PART)]).unflatten(0, codes.shape[:2])
