"""Refit of scales to the proxy loss, codes fixed.

A band's weight is linear in its row scales and, for pyramids, in its levels' scales. Each row of tiles has a problem of its own with one
unknown; the levels share one small linear system. Both have their exact solution, so the loss never rises beyond rounding. Scales of
whole rows are safe to fit this way; scales of single blocks overfit the Hessian. h = None is the identity, without its matrix. With a
metric `g` of the outputs the loss is tr(G E H E^T), and the row scales, too, share one linear system.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.codebook.pyramid import Pulses
from voroq.quantized import Band
from voroq.shapes import Matrix, Square

Outputs = Float[Tensor, "out out"] | None
"""The metric of the outputs, or rows that are independent."""


def refit_rows(w: Matrix, h: Square | None, band: Band, codes: Int[Tensor, "rows cols s"], *, g: Outputs = None) -> Band:
    """`band`, which covers all columns of `w` in stored order, with the scales that minimise the loss; a row of zeros keeps its own."""
    words = replace(band, scale=torch.ones_like(band.scale)).decode(codes, w.shape[0])
    image = words if h is None else words @ h
    if g is not None:
        return _refit_rows_together(w, band, words, image, g)
    shared, power = (band.tile.cut(part).reshape(codes.shape[0], -1).sum(1) for part in (image * w, image * words))
    return replace(band, scale=torch.where(power > 0, shared / power, band.scale))


def _refit_rows_together(w: Matrix, band: Band, words: Matrix, image: Matrix, g: Float[Tensor, "out out"]) -> Band:
    """With P_r the words of row r of tiles: sum_s tr(G P_r H P_s^T) scale_s = tr(G W H P_r^T)."""
    rows, tall = band.scale.shape[0], band.tile.rows
    missing = rows * tall - w.shape[0]
    pairs = torch.nn.functional.pad(g * (image @ words.T), (0, missing, 0, missing)).double()  # [out out], padded to whole tiles
    normal = pairs.reshape(rows, tall, rows, tall).sum((1, 3))
    right = torch.nn.functional.pad(((g @ w) * image).double().sum(1), (0, missing)).reshape(rows, tall).sum(1)
    used = normal.diagonal() > 0
    scales = torch.linalg.solve(normal[used][:, used], right[used])
    return replace(band, scale=band.scale.masked_scatter(used, scales.to(band.scale)))


def refit_levels(w: Matrix, h: Square | None, band: Band, codes: Int[Tensor, "rows cols s"], *, g: Outputs = None) -> Band:
    """`band` of `Pulses` with the level scales that minimise the loss; a level without words keeps its own."""
    book: Pulses = band.codebook
    count = len(book.pulses)
    level = codes[..., 0].reshape(-1).long()
    used = level.bincount(minlength=count + 1)[:count] > 0
    words = replace(band, codebook=replace(book, scales=torch.ones_like(book.scales))).decode(codes, w.shape[0])

    def by_level(matrix: Matrix) -> Float[Tensor, "levels"]:
        sums = band.tile.cut(matrix * words).double().sum(1)
        return sums.new_zeros(count + 1).index_add_(0, level, sums)[:count]

    def image(matrix: Matrix) -> Matrix:
        matrix = matrix if h is None else matrix @ h
        return matrix if g is None else g @ matrix

    right, normal = by_level(image(w)), torch.eye(count, dtype=torch.float64, device=w.device)
    for i in used.nonzero()[:, 0].tolist():
        share = band.tile.join((level == i)[:, None].expand(-1, band.tile.size).to(w), w.shape[0]) * words
        normal[i] = by_level(image(share))
    scales = torch.linalg.solve(normal[used][:, used], right[used])
    return replace(band, codebook=replace(book, scales=book.scales.masked_scatter(used, scales.to(book.scales))))
