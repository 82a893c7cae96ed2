"""Gain and shape apart: a word is gains[j] * y / ||y||, y in P(dim, pulses), under one number for y and another for the gain.

This is the form of the paper (van der Ouderaa et al. 2024, arXiv 2410.16926), with the gains that are best in theory; `Pyramids` reach a
lower error with the same bits, since here every norm gets the same number of directions and two fractions of a bit are lost.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.codebook.pyramid import move_pulses, stream_widths
from voroq.numerics.bits import merge_streams, split_streams
from voroq.numerics.gains import best_gains
from voroq.numerics.pyramid import count, index_of, nearest_direction, vector_of
from voroq.shapes import Codes, Vectors


@dataclass(frozen=True)
class GainShape:
    dim: int
    pulses: int
    gains: Float[Tensor, "levels"]

    exact = False

    def __post_init__(self) -> None:
        levels = self.gains.shape[0]
        if levels < 2 or levels & (levels - 1):
            raise ValueError(f"gains come in powers of two, at least 2; got {levels}")
        if self.pulses < 1 or count(self.dim, self.pulses) >= 1 << 63 or sum(self.widths) > 64:
            raise ValueError(f"P({self.dim}, {self.pulses}) with {levels} gains exceeds 64 bits (63 for the direction)")

    @property
    def widths(self) -> tuple[int, ...]:
        return (*self._direction, self.gains.shape[0].bit_length() - 1)

    @property
    def _direction(self) -> tuple[int, ...]:
        """Bits of the streams of the direction's number."""
        return stream_widths((count(self.dim, self.pulses) - 1).bit_length())

    def encode(self, v: Vectors, metric: Float[Tensor, "dim dim"] | None = None) -> Codes:
        """The direction with the smallest angle, then the gain nearest to the length of `v` along it; in a `metric`, single pulses of that
        direction move while they help."""
        y = nearest_direction(v, self.pulses)
        length = (v * y).sum(1) / y.square().sum(1)
        if metric is not None:
            y = move_pulses(v / length.clamp_min(1e-12)[:, None], y, metric)
            image = y @ metric
            length = (v * image).sum(1) / (y * image).sum(1)
        gain = (length * y.norm(dim=1))[:, None].sub(self.gains.to(v)).abs().argmin(1)
        return torch.cat([split_streams(index_of(y.long()), self._direction), gain[:, None]], dim=1)

    def decode(self, codes: Codes) -> Vectors:
        index = merge_streams(codes[:, :-1], self._direction).clamp_max(count(self.dim, self.pulses) - 1)
        y = vector_of(index, torch.full_like(index, self.pulses), self.dim).to(self.gains.dtype)
        return (self.gains[codes[:, -1].long()] / y.norm(dim=1))[:, None] * y

    def tensors(self) -> dict[str, Tensor]:
        return {"gains": self.gains}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "GainShape":
        return replace(self, gains=tensors["gains"])


@lru_cache(maxsize=32)
def gain_shape(dim: int, bits: int, row: int) -> GainShape:
    """The form at `bits` bits per vector for rows of `row` weights, with the 1 to 4 gain bits that are best on fixed Gaussian vectors.

    The gains are those of the length along the word, which the angle shortens: by how much is measured on the same vectors.
    """
    v = torch.randn(1 << 12, dim, generator=torch.Generator().manual_seed(0))
    found = []
    for gain_bits in range(1, 5):
        pulses = 0
        while count(dim, pulses + 1) <= 1 << bits - gain_bits:
            pulses += 1
        if pulses:
            y = nearest_direction(v, pulses)
            shortened = float(((v * y).sum(1) / y.norm(dim=1) / v.norm(dim=1)).mean())
            book = GainShape(dim, pulses, shortened * torch.tensor(best_gains(dim, max(row, dim + 1), gain_bits)))
            found.append((float((v - book.decode(book.encode(v))).square().mean()), gain_bits, book))
    return min(found, key=lambda entry: entry[:2])[2]
