"""First and second moments of a layer's inputs, summed over calibration tokens.

    second = sum x x^T  [in in]      first = sum x  [in]      count = tokens

Law: merge(observe(empty, a), observe(empty, b)) == observe(empty, cat(a, b)) up to rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.shapes import Square


@dataclass(frozen=True)
class Moments:
    second: Square
    first: Float[Tensor, "in"]
    count: int

    @staticmethod
    def empty(columns: int, device: torch.device | str = "cpu") -> "Moments":
        return Moments(torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device), 0)

    def hessian(self) -> Square:
        """E[x x^T], uncentred; zero when nothing was seen."""
        return self.second / max(self.count, 1)


def observe(moments: Moments, x: Float[Tensor, "tok in"]) -> Moments:
    """`moments` after also seeing the rows of `x`; accumulated in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, moments.second.dtype))
    return Moments(moments.second + x.T @ x, moments.first + x.sum(0), moments.count + x.shape[0])


def merge(a: Moments, b: Moments) -> Moments:
    return Moments(a.second + b.second, a.first + b.first, a.count + b.count)
