"""GPTQ: second-order error feedback on a scalar grid (Frantar et al. 2022, arXiv 2210.17323).

1. order the columns by diag(H), largest first (act-order)
2. for each group: fit the grid on the columns as the feedback has left them; round column by column, feed the error forward
"""

from dataclasses import dataclass

import torch

from voroq.errors import VoroqError
from voroq.methods.rtn import check_grid, grid_bits, grid_slabs
from voroq.moments import Moments
from voroq.numerics.linalg import damped
from voroq.quantized import Quantized
from voroq.rounding.feedback import feedback
from voroq.shapes import Matrix
from voroq.transform.chain import Chain
from voroq.transform.permute import Permute


@dataclass(frozen=True)
class GPTQ:
    """Error feedback on a scalar grid."""

    bits: int = 4
    """bits per weight of the grid, 1 to 8"""
    group_size: int | None = 128
    """input columns that share scale and zero point in a row; none = the whole row"""
    act_order: bool = True
    """round the columns with the largest activations first; costs a stored permutation"""
    grid: str = "mse"
    """how the range of a group is chosen: minmax, or mse (the shrunk range with the least |error|^2.4)"""
    damping: float = 0.01
    """added to the Hessian's diagonal, relative to its mean"""

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, self.grid)
        check_damping(self.damping)

    def __call__(self, w: Matrix, moments: Moments, rng: torch.Generator) -> Quantized:
        h, notes = damped(moments.hessian(), self.damping)
        transform = Chain((Permute(activation_order(h)),)) if self.act_order else Chain()
        slabs = grid_slabs(w.shape[1], self.bits, self.group_size, self.grid)
        done = feedback(transform.weight(w), transform.hessian(h), slabs)
        return Quantized((w.shape[0], w.shape[1]), transform, done.bands, done.codes, notes)

    def stored_bits(self, shape: tuple[int, int], float_bits: int = 16) -> int:
        """Bits the native format stores for a matrix of `shape` (out, in): codes, scales, zero points, permutation."""
        return grid_bits(shape, self.bits, self.group_size, float_bits) + (16 * shape[1] if self.act_order else 0)


def activation_order(h: torch.Tensor) -> torch.Tensor:
    """Columns by falling diagonal of `h` [in in]; ties keep their order."""
    return torch.argsort(h.diagonal(), descending=True, stable=True)


def check_damping(damping: float) -> None:
    if not 0 <= damping <= 1:
        raise VoroqError(f"damping={damping:g} is out of range; give 0 to 1, relative to the Hessian's mean diagonal")
