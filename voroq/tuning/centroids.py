"""Refit of the tables to the proxy loss, codes fixed: a linear least-squares problem, solved by conjugate gradients.

The stored weight is linear in all tables of all bands at once, W(C) = D C, and the loss is a quadratic form of W - D C, with Q E half its
gradient at E (G E H in the metric of both sides), so the optimum solves  D^T Q D C = D^T Q W.  Applying the left side costs the products
in Q and one sum of the result by code, which is what makes a 65536-entry table as easy as one of 16. (GPTVQ's "M step", AQLM's codebook
update; solved here instead of descended.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.quantized import Band
from voroq.shapes import Matrix

Tables = list[Tensor]


@runtime_checkable
class Quadratic(Protocol):
    """A quadratic form of the error of a weight [out in] (`rounding/metric.py`)."""

    def gradient(self, error: Matrix) -> Matrix:
        """Half its gradient at `error`."""

    def diagonal(self, out: int) -> Matrix:
        """What the square of each entry counts."""


def refit(
    w: Matrix, loss: Quadratic, bands: tuple[Band, ...], codes: tuple[Tensor, ...], *, steps: int = 10
) -> tuple[Band, ...]:
    """`bands` with tables that lower `loss` for `w` [out in] in stored order; at most `steps` of conjugate gradients, preconditioned
    by the diagonal of the normal matrix (the summed diagonal of the loss over a centroid's places).

    Started at the present tables, so the loss never rises beyond rounding. Bands must be tables or residual tables.
    """
    adjoints = [_Adjoint.of(band, code, w.shape[0]) for band, code in zip(bands, codes, strict=True)]
    stages = [stage.centroids for band in bands for stage in _stages(band)]

    def apply(tables: Tables) -> Matrix:
        refitted = _with_tables(bands, tables)
        return torch.cat([band.decode(code, w.shape[0]) for band, code in zip(refitted, codes, strict=True)], dim=1)

    def adjoint(error: Matrix) -> Tables:
        graded = loss.gradient(error)
        return [t for band, a in zip(bands, adjoints, strict=True) for t in a(graded[:, band.start : band.stop])]

    weights = loss.diagonal(w.shape[0]).contiguous()
    mass = [t for band, a in zip(bands, adjoints, strict=True) for t in a(weights[:, band.start : band.stop])]
    solution = _conjugate_gradients(apply, adjoint, mass, w, stages, steps)
    return _with_tables(bands, solution)


def _conjugate_gradients(
    apply: Callable[[Tables], Matrix], adjoint: Callable[[Matrix], Tables], mass: Tables, w: Matrix, start: Tables, steps: int
) -> Tables:
    x = [t.clone() for t in start]
    residual = adjoint(w - apply(x))
    scaled = _over(residual, mass)
    direction = [t.clone() for t in scaled]
    norm = first = _dot(residual, scaled)
    for _ in range(steps):
        if norm <= 1e-10 * first or norm == 0:
            break
        image = adjoint(apply(direction))
        curvature = _dot(direction, image)
        if curvature <= 0:
            break
        step = norm / curvature
        for t, d, r, i in zip(x, direction, residual, image, strict=True):
            t += step * d
            r -= step * i
        scaled = _over(residual, mass)
        before, norm = norm, _dot(residual, scaled)
        direction = [r + (norm / before) * d for r, d in zip(scaled, direction, strict=True)]
    return x


def _over(tables: Tables, mass: Tables) -> Tables:
    """Each residual over its mass; what no code points to has neither and stays where it is."""
    return [torch.where(m > 0, t / m.clamp_min(torch.finfo(m.dtype).tiny), t) for t, m in zip(tables, mass, strict=True)]


def _dot(a: Tables, b: Tables) -> float:
    return float(sum((s.double() * t.double()).sum() for s, t in zip(a, b, strict=True)))


def _stages(band: Band) -> tuple[Table, ...]:
    book = band.codebook
    if isinstance(book, Table):
        return (book,)
    if isinstance(book, Residual):
        return book.stages
    raise TypeError(f"only tables can be refitted, got {type(book).__name__}")


def _with_tables(bands: tuple[Band, ...], tables: Tables) -> tuple[Band, ...]:
    left = iter(tables)
    out = []
    for band in bands:
        stages = tuple(Table(next(left)) for _ in _stages(band))
        out.append(replace(band, codebook=stages[0] if isinstance(band.codebook, Table) else replace(band.codebook, stages=stages)))
    return tuple(out)


@dataclass(frozen=True)
class _Adjoint:
    """Sums the gradient of a band's columns by code, stage by stage, in sorted order (no atomic adds: deterministic)."""

    band: Band
    orders: tuple[Int[Tensor, "_"], ...]
    lengths: tuple[Int[Tensor, "_"], ...]

    @staticmethod
    def of(band: Band, codes: Int[Tensor, "rows cols s"], out: int) -> "_Adjoint":
        flat = codes.reshape(-1, codes.shape[-1]).long()
        sizes = [stage.centroids.shape[0] for stage in _stages(band)]
        return _Adjoint(
            band,
            tuple(torch.argsort(flat[:, s], stable=True) for s in range(len(sizes))),
            tuple(torch.bincount(flat[:, s], minlength=k) for s, k in enumerate(sizes)),
        )

    def __call__(self, gradient: Float[Tensor, "out c"]) -> Tables:
        vectors = self.band.tile.cut(gradient)  # rows that only pad the matrix are cut as zero: they pull at nothing
        return [
            torch.segment_reduce(vectors[order], "sum", lengths=lengths, axis=0)
            for order, lengths in zip(self.orders, self.lengths, strict=True)
        ]
