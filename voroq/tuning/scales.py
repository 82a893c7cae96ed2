"""Refit of scales to the proxy loss, codes fixed.

A band's weight is linear in its row scales and, for pyramids, in its levels' scales. Each row of tiles has a problem of its own with one
unknown; the levels share one small linear system. Both have their exact solution, so the loss never rises beyond rounding. Scales of
whole rows are safe to fit this way; scales of single blocks overfit the Hessian. h = None is the identity, without its matrix.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.codebook.pyramid import Pulses
from voroq.quantized import Band
from voroq.shapes import Matrix, Square


def refit_rows(w: Matrix, h: Square | None, band: Band, codes: Int[Tensor, "rows cols s"]) -> Band:
    """`band`, which covers all columns of `w` in stored order, with the scales that minimise tr(E H E^T)."""
    words = replace(band, scale=torch.ones_like(band.scale)).decode(codes, w.shape[0])
    image = words if h is None else words @ h
    shared, power = (band.tile.cut(part).reshape(codes.shape[0], -1).sum(1) for part in (image * w, image * words))
    return replace(band, scale=torch.where(power > 0, shared / power, band.scale))


def refit_levels(w: Matrix, h: Square | None, band: Band, codes: Int[Tensor, "rows cols s"]) -> Band:
    """`band` of `Pulses` with the level scales that minimise tr(E H E^T); a level without words keeps its own."""
    book: Pulses = band.codebook
    count = len(book.pulses)
    level = codes[..., 0].reshape(-1).long()
    used = level.bincount(minlength=count + 1)[:count] > 0
    words = replace(band, codebook=replace(book, scales=torch.ones_like(book.scales))).decode(codes, w.shape[0])

    def by_level(matrix: Matrix) -> Float[Tensor, "levels"]:
        sums = band.tile.cut(matrix * words).double().sum(1)
        return sums.new_zeros(count + 1).index_add_(0, level, sums)[:count]

    right, normal = by_level(w if h is None else w @ h), torch.eye(count, dtype=torch.float64, device=w.device)
    for i in used.nonzero()[:, 0].tolist():
        share = band.tile.join((level == i)[:, None].expand(-1, band.tile.size).to(w), w.shape[0]) * words
        normal[i] = by_level(share if h is None else share @ h)
    scales = torch.linalg.solve(normal[used][:, used], right[used])
    return replace(band, codebook=replace(book, scales=book.scales.masked_scatter(used, scales.to(book.scales))))
