"""The gain of a block of a rotated row, and the scalar quantizer that is best for it.

A row of n weights whose direction is uniform on the sphere gives a block of d of them the share B of its squared norm with
B ~ Beta(d / 2, (n - d) / 2). The gain in units of the row's root mean square is sqrt(n B), which tends to chi_d for long rows. Its best
levels are Lloyd's and Max's: every level the mean of its cell, every border halfway between levels. Quantiles of the distribution,
which give every level the same use, are not the best and lose up to a decibel at d = 8.
"""

from functools import lru_cache

import torch

GRID = 1 << 15
"""Cells in which the density is held."""


@lru_cache
def best_gains(dim: int, row: int, bits: int) -> tuple[float, ...]:
    """The 2**bits levels for sqrt(row * B), rising; `row` weights in a row, `dim` in a block. Raises ValueError unless dim < row."""
    edges, mass, moment = _integrals(dim, row)
    shares = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = _interpolate(shares, mass, edges)
    for _ in range(5000):
        borders = torch.cat([edges[:1], (levels[1:] + levels[:-1]) / 2, edges[-1:]])
        moved = _interpolate(borders, edges, moment).diff() / _interpolate(borders, edges, mass).diff()
        if torch.allclose(moved, levels, rtol=1e-10, atol=0):
            break
        levels = moved
    return tuple(levels.tolist())


def _integrals(dim: int, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points g (float64, rising), and up to each of them the integrals of the density of sqrt(row * B) and of g times it."""
    if not 0 < dim < row:
        raise ValueError(f"a block of {dim} weights is no part of a row of {row}")
    most = min(row, dim + 12 * (2 * dim) ** 0.5 + 40) ** 0.5
    edges = torch.arange(GRID + 1, dtype=torch.float64) * most / GRID
    gain = (edges[1:] + edges[:-1]) / 2
    log = (dim - 1) * gain.log() + ((row - dim) / 2 - 1) * torch.log1p(-gain.square() / row)
    density = torch.exp(log - log.max())
    density /= density.sum()
    zero = torch.zeros(1, dtype=torch.float64)
    return edges, torch.cat([zero, density.cumsum(0)]), torch.cat([zero, (density * gain).cumsum(0)])


def _interpolate(x: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The piecewise linear function through (at, values), `at` rising, at `x`."""
    right = torch.searchsorted(at, x).clamp(1, len(at) - 1)
    width = (at[right] - at[right - 1]).clamp_min(1e-300)
    return values[right - 1] + (values[right] - values[right - 1]) * ((x - at[right - 1]) / width).clamp(0, 1)
