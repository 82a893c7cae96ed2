"""Error feedback: the one loop behind GPTQ, GPTVQ, LDLQ and VPTQ.

Columns are rounded in order, a tile's width b at a time. What rounding them costs is paid for by the columns still to come:

    e = (w_b - q_b) inv(U_bb)        w_rest -= e U_b,rest        inv(H) = U^T U, U upper triangular

Tile 1x1 on a grid is GPTQ, 1xd on tables GPTVQ, dx1 VPTQ ("channel-independent": the metric of a tile is then a scalar, so plain
Euclidean search is optimal). The squared errors sum(e^2) add up to the proxy loss tr(E H E^T) exactly, clamped or not; that is
the theorem the tests hold the loop to. (Frantar et al. 2022, van Baalen et al. 2024, Liu et al. 2024.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.numerics.linalg import inverse_factor
from voroq.quantized import Band, Slab
from voroq.shapes import Matrix, Square


@dataclass(frozen=True)
class Rounded:
    """Bands and their codes in column order, and `loss` [out]: the proxy loss of each row."""

    bands: tuple[Band, ...]
    codes: tuple[Tensor, ...]
    loss: Float[Tensor, "out"]
    targets: Float[Tensor, "out in"]
    """What each column was when its turn came: the weight plus the feedback of the columns before it."""


def feedback(w: Matrix, h: Square, slabs: Sequence[Band | Slab], *, metric: bool = False, lazy: int = 128) -> Rounded:
    """Round `w` [out in] under the positive definite `h` [in in], slab after slab.

    A `Slab` is fitted when its first column is due, on columns that have received all earlier feedback. `metric` searches each
    tile in its conditional metric inv(U_bb^T U_bb) instead of the Euclidean one (the same thing for tiles one column wide).
    `lazy` columns are finished before the rest of the matrix is updated; it changes the speed, not the result.
    """
    u = inverse_factor(h)
    out = w.shape[0]
    rest = w.T.contiguous()  # [in out]: a column of w is a contiguous row here
    targets = torch.empty_like(rest)
    loss = torch.zeros(out, dtype=w.dtype, device=w.device)
    bands, codes = [], []
    for slab in slabs:
        band = slab if isinstance(slab, Band) else slab.fit(rest[slab.start : slab.stop].T)
        width = band.tile.cols
        parts = []
        for start in range(band.start, band.stop, max(width, lazy // width * width)):
            stop = min(start + max(width, lazy // width * width), band.stop)
            errors = torch.empty(stop - start, out, dtype=w.dtype, device=w.device)
            for i in range(start, stop, width):
                j = i + width
                here = u[i:j, i:j]
                part = band.encode(rest[i:j].T, conditional_metric(here) if metric and width > 1 else None)
                error = _owed(rest[i:j] - band.decode(part, out).T, here)
                targets[i:j] = rest[i:j]
                rest[j:stop] -= u[i:j, j:stop].T @ error
                errors[i - start : j - start] = error
                parts.append(part)
            rest[stop:] -= u[start:stop, stop:].T @ errors
            loss += errors.square().sum(0)
        bands.append(band)
        codes.append(torch.cat(parts, dim=1))
    return Rounded(tuple(bands), tuple(codes), loss, targets.T)


def conditional_metric(u: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    """inv(u^T u): what an error in a tile's columns costs once all later columns have answered it (a Schur complement of H)."""
    inverse = torch.linalg.solve_triangular(u, torch.eye(u.shape[0], dtype=u.dtype, device=u.device), upper=True)
    return inverse @ inverse.T


def _owed(delta: Float[Tensor, "c out"], u: Float[Tensor, "c c"]) -> Float[Tensor, "c out"]:
    """Transpose of (delta^T) inv(u)."""
    if u.shape[0] == 1:
        return delta / u
    return torch.linalg.solve_triangular(u.T, delta, upper=False)
