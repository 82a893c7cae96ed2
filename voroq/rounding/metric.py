"""What an error costs, and the steps that lower it.

    Metric    loss = tr(G E H E^T)                          one matrix for the inputs, and where it is known one for the outputs
    Guided    loss = sum over groups of rows tr(E_k H_k E_k^T)    a matrix of the inputs for every group

G = None is the identity: rows are independent.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.numerics.linalg import damped
from voroq.quantized import Band
from voroq.rounding import descent, feedback, kronecker
from voroq.rounding.feedback import Rounded
from voroq.shapes import Matrix, Square


@runtime_checkable
class Loss(Protocol):
    """A quadratic form of the error of a weight [out in], in stored order."""

    def feedback(self, w: Matrix, bands: Sequence[Band]) -> Rounded: ...

    def descend(self, w: Matrix, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int) -> Rounded: ...

    def anneal(self, w: Matrix, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int, rng: torch.Generator) -> Rounded: ...

    def gradient(self, error: Matrix) -> Matrix:
        """Half the gradient of the loss at `error`."""

    def diagonal(self, out: int) -> Matrix:
        """What the square of each entry of an error [out in] counts."""


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

    def anneal(self, w: Matrix, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int, rng: torch.Generator) -> Rounded:
        if self.g is None:
            return descent.anneal(w, self.h, bands, codes, sweeps=sweeps, rng=rng)
        return kronecker.anneal(w, self.h, self.g, bands, codes, sweeps=sweeps, rng=rng)

    def gradient(self, error: Matrix) -> Matrix:
        return error @ self.h if self.g is None else self.g @ (error @ self.h)

    def diagonal(self, out: int) -> Matrix:
        along = self.h.diagonal()
        return along.expand(out, -1) if self.g is None else torch.outer(self.g.diagonal(), along)


@dataclass(frozen=True)
class Guided:
    """`hs` [n in in]: one for each of n even groups of rows, which begin and end with tiles `height` rows high: a tile belongs to
    the group that its first row lies in. (GuidedQuant, Kim et al. 2025, arXiv 2505.07004.)"""

    hs: Float[Tensor, "n in in"]
    height: int

    def feedback(self, w: Matrix, bands: Sequence[Band]) -> Rounded:
        return _stacked([feedback.feedback(w[rows], h, bands) for rows, h in self._groups(w.shape[0])])

    def descend(self, w: Matrix, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int) -> Rounded:
        parts = self._parts(w.shape[0], bands, codes)
        return _stacked([descent.descend(w[rows], h, bands, own, sweeps=sweeps) for rows, h, own in parts])

    def anneal(self, w: Matrix, bands: Sequence[Band], codes: Sequence[Tensor], *, sweeps: int, rng: torch.Generator) -> Rounded:
        parts = self._parts(w.shape[0], bands, codes)
        return _stacked([descent.anneal(w[rows], h, bands, own, sweeps=sweeps, rng=rng) for rows, h, own in parts])

    def gradient(self, error: Matrix) -> Matrix:
        return torch.cat([error[rows] @ h for rows, h in self._groups(error.shape[0])])

    def diagonal(self, out: int) -> Matrix:
        return torch.cat([h.diagonal().expand(rows.stop - rows.start, -1) for rows, h in self._groups(out)])

    def _parts(self, out: int, bands: Sequence[Band], codes: Sequence[Tensor]) -> Iterator[tuple[slice, Square, list[Tensor]]]:
        for rows, h in self._groups(out):
            yield rows, h, [
                part[rows.start // band.tile.rows : -(-rows.stop // band.tile.rows)] for band, part in zip(bands, codes, strict=True)
            ]

    def _groups(self, out: int) -> Iterator[tuple[slice, Square]]:
        count, larger = divmod(out, len(self.hs))
        ends = [count * k + min(k, larger) for k in range(len(self.hs) + 1)]  # as torch.tensor_split has it
        aligned = [min(out, -(-end // self.height) * self.height) for end in ends]
        for (start, stop), h in zip(itertools.pairwise(aligned), self.hs, strict=True):
            if start < stop:
                yield slice(start, stop), h


def _stacked(parts: Sequence[Rounded]) -> Rounded:
    """Rows below rows, of matrices rounded by the same bands."""
    codes = tuple(torch.cat(part) for part in zip(*[one.codes for one in parts], strict=True))
    return Rounded(parts[0].bands, codes, torch.cat([one.loss for one in parts]), torch.cat([one.targets for one in parts]))


def outputs_metric(second: Float[Tensor, "out out"], damping: float) -> tuple[Float[Tensor, "out out"], tuple[str, ...]]:
    """`second` moments of gradients as the G of a `Metric`, of mean diagonal 1 and damped; and notes on what that took."""
    g, notes = damped(second / second.diagonal().mean().clamp_min(1e-30), damping)
    return g, tuple(f"outputs: {note}" for note in notes)


def guided_metric(
    groups: Float[Tensor, "n in in"], damping: float, height: int, turned: Callable[[Square], Square]
) -> tuple[Guided, tuple[str, ...]]:
    """The moments of `groups` of rows as a `Guided`, `turned` into stored order, together of mean diagonal 1 and each damped; and
    notes on what that took."""
    size = torch.stack([one.diagonal().mean() for one in groups]).mean().clamp_min(1e-30)
    hs, notes = zip(*[damped(one / size, damping) for one in groups], strict=True)
    return Guided(torch.stack([turned(h) for h in hs]), height), tuple(dict.fromkeys(f"guided: {note}" for more in notes for note in more))
