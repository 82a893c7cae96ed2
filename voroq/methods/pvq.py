"""PVQ: vectors on integer pyramids, no codebook stored (van der Ouderaa et al. 2024, arXiv 2410.16926), with second-order feedback.

    1. optionally rotate inputs, or inputs and outputs, by a randomised Hadamard transform
    2. one scale per row of tiles, its root mean square; the levels' scales fitted to the matrix by Lloyd's rule
    3. sweep with error feedback. Tiles down the output (16 x 1): the feedback is exact column by column and the search Euclidean. Tiles
       along the input (1 x 16): the search is in the metric of what later columns cannot mend
    4. refit row scales and levels to the proxy loss, then sweeps of coordinate descent, then refit again

Without calibration data (no moments were seen) H is the identity: no feedback, the nearest words, then scales, levels and words in turn.

The words are those of `codebook/pyramid.py`, a union of pyramids; `gains="paper"` is the paper's form, one pyramid of directions and a
gain of its own bits. Step 4 is not in the paper.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from voroq.codebook.gain_shape import gain_shape
from voroq.codebook.presets import dims, preset, widths
from voroq.codebook.pyramid import Pulses, Pyramids
from voroq.errors import VoroqError
from voroq.methods.gptq import activation_order, check_damping
from voroq.methods.vptq import absorb
from voroq.moments import Moments
from voroq.numerics.bits import words_for
from voroq.numerics.linalg import damped
from voroq.quantized import Band, Quantized, Tile
from voroq.rounding.feedback import feedback
from voroq.rounding.metric import Metric, outputs_metric
from voroq.shapes import Matrix, Square, Vectors
from voroq.transform.chain import Chain
from voroq.transform.hadamard import Hadamard
from voroq.transform.permute import Permute
from voroq.tuning.scales import Outputs, refit_levels, refit_rows

SAMPLE = 1 << 15
"""Vectors on which the levels are fitted before the first sweep."""
FITS = 5
"""Steps of Lloyd's rule in that fit."""
PART = 1 << 22
"""Weights whose words are sought, or numbered, at once."""
Coded = tuple[Band, Tensor]
"""A band of all columns and its codes [rows cols s]."""


@dataclass(frozen=True)
class PVQ:
    """Pyramid vector quantization with error feedback; no codebook is stored."""

    bits: float = 3.0
    """index bits per weight; bits * dim is rounded to whole bits per vector"""
    dim: int = 16
    """weights per vector, 8 or 16 (16 reaches 4 bits, 8 reaches 6)"""
    along: str = "output"
    """the direction of a vector: output (exact feedback) or input (sought in the metric of the Hessian)"""
    rotation: str = "input"
    """randomised Hadamard rotation of inputs (their activations are rotated at run time) or of both sides: none, input, both"""
    gains: str = "levels"
    """how lengths are coded: levels (a union of pyramids, each with its scale) or paper (one pyramid of directions and gains apart)"""
    order: str = "split"
    """how words are numbered: split, or class (dim=8 only: decoded faster on a CPU up to 2.5 bits, not at all by the GPU kernels)"""
    sweeps: int = 2
    """coordinate-descent sweeps over the codes after the feedback, 0 to 100"""
    anneal: int = 0
    """sweeps over the codes at falling temperatures after that, which find what no single code's move can; 0 = none"""
    damping: float = 0.01
    """added to the Hessian's diagonal, relative to its mean"""

    def __post_init__(self) -> None:
        if self.dim not in dims():
            raise VoroqError(f"dim={self.dim} has no pyramids prepared; choose one of {', '.join(map(str, dims()))}")
        low, high = widths(self.dim)[0] / self.dim, widths(self.dim)[-1] / self.dim
        if not low <= self.bits <= high:
            raise VoroqError(f"bits={self.bits:g} is out of range for dim={self.dim}; give {low:g} to {high:g}")
        for name, choices in (("along", ("output", "input")), ("rotation", ("none", "input", "both")), ("gains", ("levels", "paper"))):
            if getattr(self, name) not in choices:
                raise VoroqError(f"{name}={getattr(self, name)!r} is unknown; choose {', '.join(choices)}")
        if self.order not in ("split", "class") or (self.order == "class" and (self.dim > 8 or self.gains == "paper")):
            here = f"dim={self.dim} with gains={self.gains}"
            raise VoroqError(f"order={self.order!r} is not there for {here}; use split, or class for dim=8 with gains=levels")
        if not 0 <= self.sweeps <= 100:
            raise VoroqError(f"sweeps={self.sweeps} is out of range; give 0 to 100")
        if not 0 <= self.anneal <= 100000:
            raise VoroqError(f"anneal={self.anneal} is out of range; give 0 to 100000")
        check_damping(self.damping)

    @property
    def two_sided(self) -> bool:
        """Whether gradients at the outputs are used: vectors down the output weigh errors by them, the paper's form does not."""
        return self.along == "output" and self.gains == "levels"

    @property
    def width(self) -> int:
        """Bits per vector."""
        return round(self.bits * self.dim)

    def __call__(self, w: Matrix, moments: Moments, rng: torch.Generator) -> Quantized:
        steps = [] if self.rotation == "none" else [Hadamard.random((w.shape[0], w.shape[1]), rng, both=self.rotation == "both")]
        if moments.count == 0:
            return self._without_data(w, Chain(tuple(steps)))
        h, notes = damped(moments.hessian(), self.damping)
        h, g = Chain(tuple(steps)).hessian(h), None
        if self.two_sided and moments.outputs is not None:
            g, more = outputs_metric(moments.outputs, self.damping)
            g, notes = (steps[0].outputs(g) if steps else g), notes + more
        if self.along == "output":
            order = Permute(activation_order(h))  # absorbed again: any order of columns costs nothing
            steps, h = [*steps, order], order.hessian(h)
        transform = Chain(tuple(steps))
        band, codes = self._numbered(*self._sweeps(transform.weight(w), Metric(h, g), rng))
        out = Quantized((w.shape[0], w.shape[1]), transform, (band,), (codes,), notes)
        return absorb(out) if self.along == "output" else out

    def _sweeps(self, w: Matrix, metric: Metric, rng: torch.Generator) -> Coded:
        bands = [self._fit(w)]
        done = metric.feedback(w, bands) if self.along == "output" else feedback(w, metric.h, bands, metric=True)
        band, codes = _refitted(w, metric.h, done.bands[0], done.codes[0], g=metric.g)
        if self.sweeps:
            done = metric.descend(w, (band,), (codes,), sweeps=self.sweeps)
            band, codes = _refitted(w, metric.h, done.bands[0], done.codes[0], g=metric.g)
        return self._annealed(w, metric, band, codes, rng) if self.anneal else (band, codes)

    def _annealed(self, w: Matrix, metric: Metric, band: Band, codes: Int[Tensor, "rows cols s"], rng: torch.Generator) -> Coded:
        """Band and codes from sweeps at falling temperatures, if they cost less."""
        least = metric.descend(w, (band,), (codes,), sweeps=0).loss.sum()
        done = metric.anneal(w, (band,), (codes,), sweeps=self.anneal, rng=rng)
        found = _refitted(w, metric.h, band, done.codes[0], g=metric.g)
        done = metric.descend(w, found[:1], found[1:], sweeps=max(1, self.sweeps))
        return _refitted(w, metric.h, found[0], done.codes[0], g=metric.g) if done.loss.sum() < least else (band, codes)

    def _without_data(self, w: Matrix, transform: Chain) -> Quantized:
        """The nearest words under H = I; no matrix of in x in, and the search goes over a part of the rows at a time."""
        w = transform.weight(w)
        band = self._fit(w)
        for _ in range(max(1, self.sweeps)):
            band, codes = _refitted(w, None, band, nearest_by_rows(w, band))
        band, codes = self._numbered(band, codes)
        return Quantized((w.shape[0], w.shape[1]), transform, (band,), (codes,), ("no calibration data: every vector is its nearest word",))

    def _fit(self, w: Matrix) -> Band:
        tile = self.tile
        down, along = tile.grid(*w.shape)
        vectors: Vectors = tile.cut(w)
        power = vectors.reshape(down, -1).square().mean(1)
        scale = power.sqrt().clamp_min(2.0**-24)  # the least that float16 holds, for rows of zeros
        if self.gains == "paper":
            book = gain_shape(self.dim, self.width, w.shape[1])
            book = book.with_tensors({"gains": book.gains.to(w)})
            return Band(0, w.shape[1], tile, book, scale)
        vectors = (vectors / scale.repeat_interleave(along)[:, None])[:: max(1, vectors.shape[0] // SAMPLE)]
        book = preset(self.dim, self.width).spelled
        book = book.with_tensors({"scales": book.scales.to(w)})
        for _ in range(FITS):
            book = book.with_tensors({"scales": book.fitted(vectors, book.encode(vectors))})
        return Band(0, w.shape[1], tile, book, scale)

    def _numbered(self, band: Band, codes: Int[Tensor, "rows cols s"]) -> Coded:
        """The same words under their numbers, as they are stored."""
        if not isinstance(band.codebook, Pulses):
            return band, codes
        book = Pyramids(band.codebook.dim, band.codebook.pulses, band.codebook.scales, self.width, f"{self.order}-v1")
        step = max(1, PART // (codes.shape[1] * book.dim))
        numbers = [book.number(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in codes.split(step)]
        return replace(band, codebook=book), torch.cat(numbers)

    @property
    def tile(self) -> Tile:
        return Tile(self.dim, 1) if self.along == "output" else Tile(1, self.dim)

    def stored_bits(self, shape: tuple[int, int], float_bits: int = 16) -> int:
        """Bits the native format stores for a matrix of `shape` (out, in): codes, scales, signs of the rotation."""
        out, columns = shape
        if columns % self.tile.cols:
            raise VoroqError(f"along=input needs multiples of dim={self.dim} columns, got {columns}; use along=output for this linear")
        down, along = self.tile.grid(out, columns)
        signs = {"none": (), "input": (columns,), "both": (columns, out)}[self.rotation]
        if self.gains == "paper":
            book = gain_shape(self.dim, self.width, columns)
            width, levels = sum(book.widths), book.gains.shape[0]
        else:
            width, levels = self.width, len(preset(self.dim, self.width).pulses)
        words = down * words_for(along, width) + sum(words_for(n, 1) for n in signs)
        return 32 * words + (down + levels) * float_bits


def nearest_by_rows(w: Matrix, band: Band) -> Int[Tensor, "rows cols s"]:
    """The codes of the words of `band` nearest to `w`, found for at most `PART` weights at a time."""
    down, _ = band.tile.grid(*w.shape)
    step = max(1, PART // (w.shape[1] * band.tile.rows))
    parts = []
    for start in range(0, down, step):
        rows = slice(start * band.tile.rows, (start + step) * band.tile.rows)
        parts.append(replace(band, scale=band.scale[start : start + step]).encode(w[rows]))
    return torch.cat(parts)


def _refitted(w: Matrix, h: Square | None, band: Band, codes: Int[Tensor, "rows cols s"], g: Outputs = None) -> Coded:
    """`band` with the row scales, and then the levels, that suit its codes best; the paper's gains stay what theory says."""
    if isinstance(band.codebook, Pulses):
        band = refit_rows(w, h, band, codes, g=g)
        band = refit_levels(w, h, band, codes, g=g)
    return band, codes
