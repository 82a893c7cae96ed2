"""Coordinate descent over codes: every column is rounded again, given all the others.

Feedback rounds a column knowing the errors before it and trusting the columns after it to answer; once all are rounded, that trust
can be checked. With E = w - q the loss tr(E H E^T) is, in one column, a parabola around

    target_j = q_j + (E H)_j / H_jj

and its curvature H_jj is one scalar, so for tiles one column wide the nearest word in the Euclidean sense is the best one. A code moves
only where that lowers the loss: the loss never rises, and where a whole sweep moves nothing no single code can be improved. (QuIP's greedy
passes, Chee et al. 2023; QuIP#'s tuning sweeps, Tseng et al. 2024, with the exact metric.)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.numerics.linalg import proxy_loss
from voroq.quantized import Band
from voroq.rounding.feedback import Rounded
from voroq.shapes import Matrix, Square


def descend(w: Matrix, h: Square, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int, lazy: int = 128) -> Rounded:
    """`codes` of `bands` after at most `sweeps` sweeps over all columns; fewer where a sweep moves nothing.

    `w` [out in] and the positive definite `h` [in in] are in stored order. `lazy` columns are finished before the rest hears of their
    moves, in one matrix product; it changes the speed, not the result. `targets` are those of the last sweep.

    Raises ValueError for tiles wider than one column.
    """
    if any(band.tile.cols > 1 for band in bands):
        raise ValueError("coordinate descent works on tiles one column wide; round wider tiles by feedback alone")
    out = w.shape[0]
    codes = [part.clone() for part in codes]
    made = torch.cat([band.decode(part, out) for band, part in zip(bands, codes, strict=True)], dim=1).T.contiguous()  # [in out]
    pull = h @ (w.T - made)  # (E H)^T
    targets = made.clone()
    for _ in range(sweeps):
        moved = False
        for band, part in zip(bands, codes, strict=True):
            for start in range(band.start, band.stop, lazy):
                stop = min(start + lazy, band.stop)
                block = slice(start, stop)
                local = part[:, start - band.start : stop - band.start]  # a view: codes change in place
                steps, targets[block] = _block(band, local, made[block], pull[block], h[block, block])
                if steps.any():
                    moved = True
                    made[block] += steps
                    pull -= h[:, block] @ steps
        if not moved:
            break
    return Rounded(tuple(bands), tuple(codes), proxy_loss(w - made.T, h), targets.T)


def _block(
    band: Band, codes: Int[Tensor, "rows c s"], made: Float[Tensor, "c out"], pull: Float[Tensor, "c out"], h: Float[Tensor, "c c"]
) -> tuple[Float[Tensor, "c out"], Float[Tensor, "c out"]]:
    """Steps and targets of a block's columns, each column knowing the steps of those before it; `codes` move in place."""
    pull, out = pull.clone(), made.shape[1]
    steps, targets = torch.empty_like(made), torch.empty_like(made)
    for i in range(made.shape[0]):
        step = pull[i] / h[i, i]
        targets[i] = made[i] + step
        column = targets[i : i + 1].T
        found = band.encode(column)
        words = band.decode(found, out)
        better = _cost(band, column - words) < _cost(band, step[:, None])
        codes[:, i] = torch.where(better[:, None], found[:, 0], codes[:, i])
        change = words[:, 0] - made[i]
        steps[i] = torch.where(better.repeat_interleave(band.tile.rows)[:out], change, torch.zeros_like(change))
        pull[i + 1 :].addr_(h[i + 1 :, i], steps[i], alpha=-1)
    return steps, targets


def _cost(band: Band, delta: Float[Tensor, "out 1"]) -> Float[Tensor, "rows"]:
    """Squared length of each tile of a column."""
    return band.tile.cut(delta).square().sum(1)
