"""Coordinate descent over codes: every column is rounded again, given all the others.

Feedback rounds a column knowing the errors before it and trusting the columns after it to answer; once all are rounded, that trust
can be checked. With E = w - q the loss tr(E H E^T) is, in one column, a parabola around

    target_j = q_j + (E H)_j / H_jj

and its curvature H_jj is one scalar, so for tiles one column wide the nearest word in the Euclidean sense is the best one. For wider tiles
j is a block of columns, 1 / H_jj the inverse of the block, and the nearest word is sought in the block as metric. A code moves only where
that lowers the loss: the loss never rises, and where a whole sweep moves nothing no single code can be improved (as far as the codebook's
search can tell). (QuIP's greedy passes, Chee et al. 2023; QuIP#'s tuning sweeps, Tseng et al. 2024, with the exact metric.)

Where no single code can be improved, several together still can. `anneal` looks for them by sweeps at a temperature that falls to nothing:
targets are off by what the temperature says, so that codes also move where that costs a little, and the next ones answer. With noise of
covariance (temperature / H_jj) at its target a column takes words about as often as Boltzmann would have it. (Kirkpatrick et al. 1983.)
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.numerics.linalg import proxy_loss
from voroq.quantized import Band
from voroq.rounding.feedback import Rounded
from voroq.shapes import Matrix, Square

HEAT = 0.1
"""Temperature at which annealing begins, in units of what a weight's error costs on average: at 0.3 it ends worse than it began, at 0.03
it finds half as much."""


def descend(w: Matrix, h: Square, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int, lazy: int = 128) -> Rounded:
    """`codes` of `bands` after at most `sweeps` sweeps over all columns; fewer where a sweep moves nothing.

    `w` [out in] and the positive definite `h` [in in] are in stored order. `lazy` columns are finished before the rest hears of their
    moves, in one matrix product; it changes the speed, not the result. `targets` are those of the last sweep.
    """
    return _swept(w, h, bands, codes, lambda loss: [0.0] * sweeps, None, lazy)


def anneal(
    w: Matrix, h: Square, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int, rng: torch.Generator, lazy: int = 128
) -> Rounded:
    """`codes` of `bands` after `sweeps` sweeps at falling temperatures, as in `descend`; `rng` is a CPU generator.

    The more sweeps, the lower it ends; with few of them it may end higher than it began.
    """
    return _swept(w, h, bands, codes, lambda loss: cooling(loss, sweeps), rng, lazy)


def cooling(loss: float, sweeps: int) -> list[float]:
    """The temperature of every sweep, falling evenly, where `loss` is what a weight costs at the start, on average."""
    return [HEAT * loss * (1 - sweep / sweeps) for sweep in range(sweeps)]


def noise(shape: Sequence[int], like: Tensor, rng: torch.Generator) -> Tensor:
    """Unit Gaussians, the same wherever `like` lies."""
    return torch.randn(tuple(shape), generator=rng, dtype=like.dtype).to(like.device)


def _swept(
    w: Matrix,
    h: Square,
    bands: Sequence[Band],
    codes: Sequence[Tensor],
    heats: Callable[[float], Sequence[float]],
    rng: torch.Generator | None,
    lazy: int,
) -> Rounded:
    out = w.shape[0]
    codes = [part.clone() for part in codes]
    made = torch.cat([band.decode(part, out) for band, part in zip(bands, codes, strict=True)], dim=1).T.contiguous()  # [in out]
    pull = h @ (w.T - made)  # (E H)^T
    targets = made.clone()
    for heat in heats(float(((w.T - made) * pull).sum()) / w.numel()):
        moved = False
        for band, part in zip(bands, codes, strict=True):
            width = band.tile.cols
            stride = max(width, lazy // width * width)
            shaken = noise((band.stop - band.start, out), w, rng) * heat**0.5 if heat else None
            for start in range(band.start, band.stop, stride):
                stop = min(start + stride, band.stop)
                block, within = slice(start, stop), slice(start - band.start, stop - band.start)
                local = part[:, within.start // width : within.stop // width]  # a view: codes change in place
                given = (made[block], pull[block], h[block, block], None if shaken is None else shaken[within])
                steps, targets[block] = _block(band, local, *given)
                if steps.any():
                    moved = True
                    made[block] += steps
                    pull -= h[:, block] @ steps
        if not moved and not heat:
            break
    return Rounded(tuple(bands), tuple(codes), proxy_loss(w - made.T, h), targets.T)


def _block(
    band: Band,
    codes: Int[Tensor, "rows t s"],
    made: Float[Tensor, "c out"],
    pull: Float[Tensor, "c out"],
    h: Float[Tensor, "c c"],
    shaken: Float[Tensor, "c out"] | None,
) -> tuple[Float[Tensor, "c out"], Float[Tensor, "c out"]]:
    """Steps and targets of a block's columns, each tile's knowing the steps of those before it; `codes` move in place. Targets are off
    by `shaken`, measured in the metric of each tile."""
    pull, out, width = pull.clone(), made.shape[1], band.tile.cols
    steps, targets = torch.empty_like(made), torch.empty_like(made)
    for i in range(0, made.shape[0], width):
        j = i + width
        metric = h[i:j, i:j] if width > 1 else None
        step = pull[i:j] / h[i, i] if metric is None else torch.linalg.solve(metric, pull[i:j])
        if shaken is not None:
            root = h[i:j, i:j].sqrt() if metric is None else torch.linalg.cholesky(metric)
            step = step + torch.linalg.solve_triangular(root.T, shaken[i:j], upper=True)
        targets[i:j] = made[i:j] + step
        columns = targets[i:j].T
        found = band.encode(columns, metric)
        words = band.decode(found, out)
        better = _cost(band, columns - words, metric) < _cost(band, step.T, metric)
        codes[:, i // width] = torch.where(better[:, None], found[:, 0], codes[:, i // width])
        steps[i:j] = torch.where(better.repeat_interleave(band.tile.rows)[:out], words.T - made[i:j], 0)
        pull[j:].addmm_(h[j:, i:j], steps[i:j], alpha=-1)
    return steps, targets


def _cost(band: Band, delta: Float[Tensor, "out w"], metric: Float[Tensor, "w w"] | None) -> Float[Tensor, "rows"]:
    """Squared length of each tile of a column of tiles, in `metric` along its columns."""
    if metric is None:
        return band.tile.cut(delta).square().sum(1)
    return band.tile.cut((delta @ metric) * delta).sum(1)
