"""Rows of numbers as packed words, one by one and without fitting: what is quantized while a model runs (keys and values of attention).

    x = unrotate(scale * words)        words from the union of pyramids of 16 (or 8) numbers, one bfloat16 scale a row

A rotation with fixed random signs spreads outliers over the row, so that it looks Gaussian, for which the presets are made. The scale is
first the root mean square, then what fits the words found best. It is bfloat16 because its range, unlike its precision, may be needed: a
half step of it is an error of 2e-6 of the power, of which 4 bits leave 6e-3.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from voroq.codebook.presets import preset, widths
from voroq.codebook.pyramid import Pyramids
from voroq.errors import VoroqError
from voroq.numerics.bits import merge_streams, pack_bits, split_streams, unpack_bits, words_for
from voroq.numerics.hadamard import random_signs, rotate, unrotate

PART = 1 << 22
"""Numbers encoded or decoded at once."""


@dataclass(frozen=True)
class RowCode:
    """Rows of `size` numbers at `bits` bits each and a scale; `seed` decides the signs of the rotation.

    Raises VoroqError for sizes and bits that have no pyramids.
    """

    size: int
    bits: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size % 8:
            raise VoroqError(f"rows of {self.size} numbers cannot be cut into pyramids; multiples of 8 can")
        low, high = widths(self.dim)[0] / self.dim, widths(self.dim)[-1] / self.dim
        if not low <= self.bits <= high:
            raise VoroqError(f"{self.bits:g} bits are out of range for rows of {self.size} numbers; give {low:g} to {high:g}")

    @property
    def dim(self) -> int:
        """Numbers under one word."""
        return 16 if self.size % 16 == 0 else 8

    @property
    def width(self) -> int:
        """Bits of a word."""
        return round(self.bits * self.dim)

    @property
    def stored_bits(self) -> float:
        """Bits per number, scale and padding counted."""
        return (32 * words_for(self.size // self.dim, self.width) + 16) / self.size

    def encode(self, x: Float[Tensor, "*rows size"]) -> tuple[Int[Tensor, "*rows w"], BFloat16[Tensor, "*rows"]]:
        """Words packed into int32, and scales. Rows of zeros come back as zeros."""
        rows = x.reshape(-1, self.size).float()
        done = [self._encode(part) for part in rows.split(max(1, PART // self.size))]
        packed, scale = (torch.cat(parts) for parts in zip(*done, strict=True))
        return packed.reshape(*x.shape[:-1], packed.shape[1]), scale.reshape(x.shape[:-1])

    def decode(self, packed: Int[Tensor, "*rows w"], scale: BFloat16[Tensor, "*rows"]) -> Float[Tensor, "*rows size"]:
        """The rows, in float32."""
        parts = zip(*(t.split(max(1, PART // self.size)) for t in (packed.reshape(-1, packed.shape[-1]), scale.reshape(-1))), strict=True)
        return torch.cat([self._decode(*part) for part in parts]).reshape(*scale.shape, self.size)

    def _encode(self, rows: Float[Tensor, "n size"]) -> tuple[Int[Tensor, "n w"], BFloat16[Tensor, "n"]]:
        book = _book(self.dim, self.width, rows.device)
        largest = rows.abs().amax(1).clamp_min(torch.finfo(torch.bfloat16).tiny)
        x = rotate(rows / largest[:, None], _signs(self.size, self.seed))
        unit = x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        codes = book.encode((x / unit).reshape(-1, self.dim))
        words = book.decode(codes).reshape(x.shape)
        scale = largest * (x * words).sum(1) / words.square().sum(1).clamp_min(1e-30)
        numbers = merge_streams(codes, book.widths).reshape(-1, self.size // self.dim)
        return pack_bits(numbers, self.width), scale.bfloat16()

    def _decode(self, packed: Int[Tensor, "n w"], scale: BFloat16[Tensor, "n"]) -> Float[Tensor, "n size"]:
        book = _book(self.dim, self.width, packed.device)
        numbers = unpack_bits(packed, self.width, self.size // self.dim).reshape(-1)
        words = book.decode(split_streams(numbers.long(), book.widths)).reshape(-1, self.size)
        return unrotate(words * scale.float()[:, None], _signs(self.size, self.seed))


@lru_cache(maxsize=64)
def _signs(size: int, seed: int) -> Float[Tensor, "size"]:
    return random_signs(size, torch.Generator().manual_seed(seed))


@lru_cache(maxsize=64)
def _book(dim: int, width: int, device: torch.device) -> Pyramids:
    book = preset(dim, width)
    return book.with_tensors({"scales": book.scales.to(device)})
