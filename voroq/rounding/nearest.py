"""Round to nearest: no Hessian, no order, no feedback."""

from collections.abc import Sequence

from torch import Tensor

from voroq.quantized import Band, Slab
from voroq.shapes import Matrix


def round_to_nearest(w: Matrix, slabs: Sequence[Band | Slab]) -> tuple[tuple[Band, ...], tuple[Tensor, ...]]:
    """Bands and codes of `w` [out in], each tile the nearest word."""
    bands = tuple(slab if isinstance(slab, Band) else slab.fit(w[:, slab.start : slab.stop]) for slab in slabs)
    return bands, tuple(band.encode(w[:, band.start : band.stop]) for band in bands)
