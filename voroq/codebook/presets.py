"""Unions of pyramids for unit Gaussians, one for every dimension and width; found by `benchmarks/pyramid_presets.py`."""

import torch

from voroq.codebook.preset_table import TABLE
from voroq.codebook.pyramid import Pyramids


def widths(dim: int) -> list[int]:
    """Bits per vector for which there is a preset in `dim` dimensions, rising; none for a dimension without presets."""
    return sorted(width for size, width in TABLE if size == dim)


def dims() -> list[int]:
    return sorted({size for size, _ in TABLE})


def distortion(dim: int, width: int) -> float:
    """Mean squared error per weight of a unit Gaussian, as measured when the preset was made."""
    return TABLE[dim, width][0]


def preset(dim: int, width: int) -> Pyramids:
    """The union of pyramids of `width` bits per vector of `dim` weights. Raises KeyError where there is none."""
    _, pulses, scales = TABLE[dim, width]
    return Pyramids(dim, pulses, torch.tensor(scales), width)
