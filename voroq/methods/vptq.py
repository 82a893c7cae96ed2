"""VPTQ: vectors down the output dimension, lookup tables, second-order feedback (Liu et al. 2024, arXiv 2409.17066).

    1. optional column scale and shift; the Hessian follows them (the reference's does not, and pays for it)
    2. columns by falling diag(H); in front of them, some with a table of their own, chosen by what they cost: a few percent that cost
       most with a finer one, or many that cost next to nothing with hardly any bits
    3. tables by k-means weighted with diag(H), and with what each place in a vector counts on average, per group of columns; a second,
       residual table on what is left
    4. sweep: column by column, nearest centroids (main and residual searched together), error fed forward; where the moments know
       the gradients at the outputs, also row by row, in the metric of both sides (`rounding/kronecker.py`)
    5. rounds: refit all tables to the proxy loss by least squares, sweep again (by feedback, then by coordinate descent), keep what
       lowers the loss
    6. absorb the permutation into the order of the codes where the format can say so (one group, no outliers)

Step 5 is not in the reference, which never touches its tables after k-means. Results stay inside its checkpoint format.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.codebook.base import Codebook
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.errors import VoroqError
from voroq.methods.gptq import activation_order, check_damping
from voroq.moments import Moments
from voroq.numerics.bits import words_for
from voroq.numerics.kmeans import kmeans
from voroq.numerics.linalg import damped, inverse_factor
from voroq.packed.vptq_format import LEAST_ROW
from voroq.quantized import Band, Quantized, Tile
from voroq.rounding.feedback import Rounded
from voroq.rounding.metric import Loss, Metric, guided_metric, outputs_metric
from voroq.shapes import Matrix, Square
from voroq.transform.affine import ColumnAffine
from voroq.transform.chain import Chain
from voroq.transform.permute import Permute
from voroq.tuning.centroids import refit

PLACES = 0.25
"""Power of what a place in a vector counts by which k-means stretches it; 0.5 would be the metric, which overstates how little the least
places count, and is worse where they differ most."""


@dataclass(frozen=True)
class VPTQ:
    """Vector quantization with error feedback, in the official VPTQ checkpoint format."""

    vector_length: int = 6
    """weights per vector, down the output dimension"""
    table_bits: int = 12
    """log2 of the centroids per table, 1 to 16"""
    residual_bits: int = 0
    """log2 of the centroids of the residual table, at most table_bits; 0 = none"""
    groups: int = 1
    """tables per matrix, one per group of input columns"""
    outlier_percent: float = 0.0
    """percentage of input columns (with permute=False the first) written with a table of their own"""
    outliers: str = "costliest"
    """which columns those are: costliest, for a finer table, or cheapest, for long vectors that leave their bits to the others"""
    outlier_vector_length: int = 4
    """weights per vector in outlier columns"""
    outlier_table_bits: int = 12
    """log2 of the centroids of the outlier table"""
    normalize: str = "none"
    """column scale and shift before the tables: none, or std (zero mean and unit deviation)"""
    permute: bool = True
    """sweep the columns with the largest activations first"""
    damping: float = 0.01
    """added to the Hessian's diagonal, relative to its mean"""
    kmeans_steps: int = 20
    """Lloyd iterations at most, per table"""
    restarts: int = 0
    """further seedings of every table, of which the best is kept"""
    rounds: int = 2
    """times the tables are refitted to the proxy loss and the matrix swept again"""
    sweeps: int = 2
    """coordinate-descent sweeps over the codes per round; 0 = rounds sweep by feedback alone"""
    anneal: int = 0
    """sweeps over the codes at falling temperatures after the rounds, which find what no single code's move can; 0 = none"""
    beam: int = 8
    """main centroids tried for each vector where there is a residual table; 1 = greedily"""

    def __post_init__(self) -> None:
        bounds = {
            "vector_length": (1, 64), "table_bits": (1, 16), "residual_bits": (0, self.table_bits), "groups": (1, 4096),
            "outlier_percent": (0, 50), "outlier_vector_length": (2, 64), "outlier_table_bits": (1, 16),
            "kmeans_steps": (1, 1000), "restarts": (0, 1000), "rounds": (0, 100), "sweeps": (0, 100), "anneal": (0, 100000),
            "beam": (1, 65536),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise VoroqError(f"{name}={getattr(self, name):g} is out of range; give {low} to {high}")
        for name, words in {"normalize": ("none", "std"), "outliers": ("costliest", "cheapest")}.items():
            if getattr(self, name) not in words:
                raise VoroqError(f"{name}={getattr(self, name)!r} is unknown; choose {' or '.join(words)}")
        check_damping(self.damping)

    def __call__(self, w: Matrix, moments: Moments, rng: torch.Generator) -> Quantized:
        h, notes = damped(moments.hessian(), self.damping)
        affine = (column_statistics(w),) if self.normalize == "std" else ()
        order = (Permute(column_order(w, h, self.columns(w.shape[1])[0], self.outliers == "cheapest")),) if self.permute else ()
        transform = Chain((*affine, *order))
        loss, more = self._loss(h, moments, transform)
        done = self._sweeps(transform.weight(w), loss, rng)
        out = Quantized((w.shape[0], w.shape[1]), transform, done.bands, done.codes, notes + more)
        return absorb(out) if self.permute else out

    def _loss(self, h: Square, moments: Moments, transform: Chain) -> tuple[Loss, tuple[str, ...]]:
        """What an error in stored order costs, by all that `moments` know; and notes."""
        if moments.groups is not None:
            height = math.lcm(self.vector_length, self.outlier_vector_length if self.outlier_percent else 1)
            return guided_metric(moments.groups, self.damping, height, transform.hessian)
        outputs, notes = (None, ()) if moments.outputs is None else outputs_metric(moments.outputs, self.damping)
        return Metric(transform.hessian(h), outputs), notes

    def _sweeps(self, w: Matrix, metric: Loss, rng: torch.Generator) -> Rounded:
        best = metric.feedback(w, self._fit(w, metric, rng))
        if self.residual_bits:
            best = metric.feedback(w, self._with_residuals(best, metric, rng))
        if self.rounds:
            best = self._rounds(w, metric, best)
        return self._annealed(w, metric, best, rng) if self.anneal else best

    def _rounds(self, w: Matrix, metric: Loss, best: Rounded) -> Rounded:
        """Tables refitted and the matrix swept again, as long as that lowers the loss."""
        bands = refit(w, metric, best.bands, best.codes)
        for done in range(self.rounds):
            tried = best if done and self.sweeps else metric.feedback(w, bands)  # what descent has reached feedback does not find again
            if self.sweeps:
                tried = metric.descend(w, bands, tried.codes, sweeps=self.sweeps)
            if tried.loss.sum() >= best.loss.sum():
                break
            best, bands = tried, refit(w, metric, tried.bands, tried.codes)
        return replace(best, bands=bands)

    def _annealed(self, w: Matrix, metric: Loss, best: Rounded, rng: torch.Generator) -> Rounded:
        """Codes from sweeps at falling temperatures, tables refitted to them and, once more, codes to those; if that lowers the loss."""
        before = metric.anneal(w, best.bands, best.codes, sweeps=self.anneal, rng=rng)
        tried = metric.descend(w, refit(w, metric, before.bands, before.codes), before.codes, sweeps=max(1, self.sweeps))
        if tried.loss.sum() >= best.loss.sum():
            return best
        return replace(tried, bands=refit(w, metric, tried.bands, tried.codes))

    def stored_bits(self, shape: tuple[int, int], float_bits: int = 16) -> int:
        """Bits the official format stores for a matrix of `shape` (out, in): codes, tables, scale and shift, permutation."""
        out, width = shape
        outliers, edges = self.columns(width)
        rows, words = -(-out // self.vector_length), words_for(edges[1] - edges[0], self.table_bits + self.residual_bits)
        bits = self.groups * rows * words * 32
        bits += self.groups * self.vector_length * (2**self.table_bits + (2**self.residual_bits if self.residual_bits else 0)) * float_bits
        if outliers:
            bits += 16 * outliers * -(-out // self.outlier_vector_length)
            bits += self.outlier_vector_length * 2**self.outlier_table_bits * float_bits
        if self.normalize != "none":
            bits += 2 * float_bits * width
        if self.permute and (outliers or self.groups > 1):
            bits += 16 * width
        return bits

    def columns(self, width: int) -> tuple[int, list[int]]:
        """Outlier columns, and the edges of the groups behind them, in a matrix `width` columns wide."""
        outliers = -(-width * self.outlier_percent // 100)
        outliers = int(outliers + (width - outliers) % self.groups)
        each = (width - outliers) // self.groups
        if each == 0:
            raise VoroqError(f"{self.groups} groups do not fit into {width} columns; give fewer groups")
        if each * (self.table_bits + self.residual_bits) < LEAST_ROW:
            raise VoroqError(
                f"a group of {each} columns with {self.table_bits + self.residual_bits} bits each is under {LEAST_ROW} bits a row, which "
                "the official vptq reader misreads; give fewer groups or larger tables"
            )
        return outliers, [outliers + each * g for g in range(self.groups + 1)]

    def _fit(self, w: Matrix, metric: Loss, rng: torch.Generator) -> list[Band]:
        counts = metric.diagonal(w.shape[0])
        outliers, edges = self.columns(w.shape[1])

        def band(start: int, stop: int, length: int, bits: int) -> Band:
            tile = Tile(length, 1)
            return Band(start, stop, tile, self._table(w[:, start:stop], counts[:, start:stop], tile, bits, rng))

        first = [band(0, outliers, self.outlier_vector_length, self.outlier_table_bits)] if outliers else []
        return first + [band(start, stop, self.vector_length, self.table_bits) for start, stop in itertools.pairwise(edges)]

    def _table(self, w: Matrix, counts: Matrix, tile: Tile, bits: int, rng: torch.Generator) -> Table:
        """A table for the vectors of `w`, the square of whose errors `counts`: by k-means that knows how much each vector and, on average,
        each place in a vector counts."""
        each = tile.cut(counts)
        places = (each.mean(0) / each.mean().clamp_min(1e-30)).clamp_min(1e-4) ** PLACES
        words = kmeans(tile.cut(w) * places, each.mean(1), 2**bits, rng, steps=self.kmeans_steps, restarts=self.restarts)
        return Table(words / places)

    def _with_residuals(self, done: Rounded, metric: Loss, rng: torch.Generator) -> list[Band]:
        """The same bands with a residual table trained on what the first sweep left of its targets."""
        counts = metric.diagonal(done.targets.shape[0])
        outliers, _ = self.columns(done.targets.shape[1])
        out = []
        for band, codes in zip(done.bands, done.codes, strict=True):
            left = done.targets[:, band.start : band.stop] - band.decode(codes, done.targets.shape[0])
            book: Codebook = band.codebook
            if band.start >= outliers:
                rest = self._table(left, counts[:, band.start : band.stop], band.tile, self.residual_bits, rng)
                book = Residual((book, rest), self.beam)
            out.append(replace(band, codebook=book))
        return out


def column_order(w: Matrix, h: Square, outliers: int, cheapest: bool = False) -> Int[Tensor, "in"]:
    """Columns by falling diag(H), the `outliers` that cost most, or least, before all others."""
    order = activation_order(h)
    if not outliers:
        return order
    chosen = torch.zeros(w.shape[1], dtype=torch.bool, device=w.device)
    chosen[column_costs(w, h).argsort(descending=not cheapest, stable=True)[:outliers]] = True
    return torch.cat([order[chosen[order]], order[~chosen[order]]])


def column_costs(w: Matrix, h: Square) -> Float[Tensor, "in"]:
    """What columns cost: the mean square of the weights, which the error of any table follows, times 1 / inv(H)_jj, what an error
    in one costs once all others have answered it."""
    return w.square().mean(0) / inverse_factor(h).square().sum(0)  # inv(H) = U^T U


@dataclass(frozen=True)
class Thinning:
    """The loss of a linear whose n cheapest columns are left out, in units of what errors as large as its weights would cost:
    `dropped` by those n, all others answering, and `kept` for the others' own errors. Both [in + 1], n from 0."""

    dropped: Float[Tensor, "n"]
    kept: Float[Tensor, "n"]

    @staticmethod
    def of(w: Matrix, moments: Moments, damping: float) -> "Thinning":
        h, _ = damped(moments.hessian(), damping)
        order = activation_order(h)
        factor = inverse_factor(h[order][:, order])
        own = (w.square().sum(0)[order] / factor.diagonal().square())[order.argsort()]  # as feedback meets them
        rising = column_costs(w, h).argsort(stable=True)
        # E U^-1, with inv(H) = U^T U, is what columns cost once those after them have answered: it sums to tr(G E H E^T)
        owed = torch.linalg.solve_triangular(inverse_factor(h[rising][:, rising]), w[:, rising], upper=True, left=False)
        lost = (owed * (owed if moments.outputs is None else outputs_metric(moments.outputs, damping)[0] @ owed)).sum(0)
        total = own.double().sum().clamp_min(1e-30)
        dropped, gone = (torch.nn.functional.pad(part.double().cumsum(0), (1, 0)) / total for part in (lost, own[rising]))
        return Thinning(dropped.cpu(), (1 - gone).clamp_min(0).cpu())

    def error(self, columns: int, distortion: float, gone: int = 0) -> float:
        """The loss with so many columns left out and a relative error of `distortion` in the others, not counting what `gone` of the
        columns cost that are left out before those."""
        columns += gone
        return float(self.dropped[columns] - self.dropped[gone] + self.kept[columns] * distortion)


def column_statistics(w: Matrix) -> ColumnAffine:
    """Mean and standard deviation of every input column; a constant column keeps scale 1."""
    scale = w.std(0, correction=0)
    return ColumnAffine(torch.where(scale > 1e-8, scale, torch.ones_like(scale)), w.mean(0))


def absorb(q: Quantized) -> Quantized:
    """`q` without its permutation, the codes reordered instead: lossless, and legal where one band covers all columns."""
    *before, last = q.transform.steps
    if not isinstance(last, Permute) or len(q.bands) != 1 or q.bands[0].tile.cols != 1:
        return q
    return replace(q, transform=Chain(tuple(before)), codes=(q.codes[0][:, last.inverse],))
