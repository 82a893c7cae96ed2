"""Round to nearest on a per-group grid: the baseline every other method must beat."""

import itertools
from dataclasses import dataclass
from functools import partial

import torch

from voroq.codebook.grid import Grid
from voroq.errors import VoroqError
from voroq.moments import Moments
from voroq.numerics.bits import words_for
from voroq.quantized import Band, Quantized, Slab, Tile
from voroq.rounding.nearest import round_to_nearest
from voroq.shapes import Matrix
from voroq.transform.chain import Chain

SHRINKS = 80
"""Ranges tried by the mse search: 1.00, 0.99, ... 0.21 of min and max."""


@dataclass(frozen=True)
class RTN:
    """Round to nearest."""

    bits: int = 4
    """bits per weight of the grid, 1 to 8"""
    group_size: int | None = 128
    """input columns that share scale and zero point in a row; none = the whole row"""
    grid: str = "minmax"
    """how the range of a group is chosen: minmax, or mse (the shrunk range with the least |error|^2.4)"""

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, self.grid)

    def __call__(self, w: Matrix, moments: Moments, rng: torch.Generator) -> Quantized:
        bands, codes = round_to_nearest(w, grid_slabs(w.shape[1], self.bits, self.group_size, self.grid))
        return Quantized((w.shape[0], w.shape[1]), Chain(), bands, codes)

    def stored_bits(self, shape: tuple[int, int], float_bits: int = 16) -> int:
        """Bits the native format stores for a matrix of `shape` (out, in): codes, scales and zero points."""
        return grid_bits(shape, self.bits, self.group_size, float_bits)


def grid_bits(shape: tuple[int, int], bits: int, group_size: int | None, float_bits: int) -> int:
    """Bits of a grouped grid: codes padded to 32-bit words per row and run of equal groups, a scale and a zero point per group."""
    out, columns = shape
    width = min(group_size or columns, columns)
    full, last = divmod(columns, width)
    words = words_for(full * width, bits) + words_for(last, bits)
    groups = full + (last > 0)
    zeros = 32 * words_for(out, bits)
    return out * words * 32 + groups * (out * float_bits + zeros)


def check_grid(bits: int, group_size: int | None, grid: str) -> None:
    """Raise VoroqError where grid options are out of range."""
    if not 1 <= bits <= 8:
        raise VoroqError(f"bits={bits} is out of range; a grid has 1 to 8 bits")
    if group_size is not None and group_size < 1:
        raise VoroqError(f"group_size={group_size} is out of range; give a positive number of columns, or none for whole rows")
    if grid not in ("minmax", "mse"):
        raise VoroqError(f"grid={grid!r} is unknown; choose minmax or mse")


def grid_slabs(columns: int, bits: int, group_size: int | None, grid: str) -> list[Slab]:
    """Groups of `group_size` columns (the last may be narrower), each a grid to be fitted when its turn comes."""
    width = min(group_size or columns, columns)
    edges = [*range(0, columns, width), columns]
    return [Slab(a, b, partial(fit_grid, start=a, bits=bits, grid=grid)) for a, b in itertools.pairwise(edges)]


def fit_grid(w: Matrix, *, start: int, bits: int, grid: str) -> Band:
    """The band of columns `w` [out c], an asymmetric grid per row whose range contains zero (GPTQ's conventions)."""
    low, high = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0)
    flat = low == high
    low, high = torch.where(flat, -torch.ones_like(low), low), torch.where(flat, torch.ones_like(high), high)
    scale, zero = _affine(low, high, bits)
    if grid == "mse":
        best = torch.full_like(scale, torch.inf)
        for i in range(SHRINKS):
            tried_scale, tried_zero = _affine(low * (1 - i / 100), high * (1 - i / 100), bits)
            word = (w / tried_scale[:, None] + tried_zero[:, None]).round().clamp(0, 2**bits - 1)
            error = ((word - tried_zero[:, None]) * tried_scale[:, None] - w).abs().pow(2.4).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
    return Band(start, start + w.shape[1], Tile(1, 1), Grid(bits), scale=scale, zero=zero)


def _affine(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    # float16 is what checkpoints store: rounding the scale here lets the codes answer to the scale that will be used
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(2.0**-24)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)
