"""What an error costs, and the steps that lower it: one matrix for the inputs, and where it is known one for the outputs.

    loss = tr(G E H E^T)          G = None is the identity: rows are independent
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.numerics.linalg import damped
from voroq.quantized import Band, Tile
from voroq.rounding import descent, feedback, kronecker
from voroq.rounding.feedback import Rounded
from voroq.shapes import Matrix, Square


@dataclass(frozen=True)
class Metric:
    """`h` [in in] in stored order and `g` [out out], both positive definite."""

    h: Square
    g: Float[Tensor, "out out"] | None = None

    def feedback(self, w: Matrix, bands: Sequence[Band]) -> Rounded:
        return feedback.feedback(w, self.h, bands) if self.g is None else kronecker.feedback(w, self.h, self.g, bands)

    def descend(self, w: Matrix, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int) -> Rounded:
        if self.g is None:
            return descent.descend(w, self.h, bands, codes, sweeps=sweeps)
        return kronecker.descend(w, self.h, self.g, bands, codes, sweeps=sweeps)

    def importance(self, start: int, stop: int, tile: Tile, out: int) -> Float[Tensor, "n"]:
        """How much each vector of columns start..stop counts: diag(H) of its columns times the mean diag(G) of its rows."""
        along = self.h.diagonal()[start:stop]
        if self.g is None:
            return along.repeat(-(-out // tile.rows))
        return tile.cut(torch.outer(self.g.diagonal(), along)).mean(1)


def outputs_metric(second: Float[Tensor, "out out"], damping: float) -> tuple[Float[Tensor, "out out"], tuple[str, ...]]:
    """`second` moments of gradients as the G of a `Metric`, of mean diagonal 1 and damped; and notes on what that took."""
    g, notes = damped(second / second.diagonal().mean().clamp_min(1e-30), damping)
    return g, tuple(f"outputs: {note}" for note in notes)
