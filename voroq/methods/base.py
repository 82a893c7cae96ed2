"""What a method is: one paper as a callable."""

from typing import Protocol, runtime_checkable

import torch

from voroq.moments import Moments
from voroq.quantized import Quantized
from voroq.shapes import Matrix


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass whose fields are its options. Pure: the same arguments give the same result on the same device."""

    def __call__(self, w: Matrix, moments: Moments, rng: torch.Generator) -> Quantized:
        """Quantize `w` [out in] given the moments of its inputs. `rng` is a CPU generator derived from (seed, site name)."""
