"""Moments of a layer's inputs, summed over calibration tokens, and of the gradients at its outputs.

    second = sum x x^T  [in in]      first = sum x  [in]      count = tokens
    outputs = E[g g^T]  [out out]    g = d log q(sampled token) / d y, with the model's own answers sampled, or None

`second` and `outputs` are the two factors of the Fisher matrix of the layer's weight; half its quadratic form is the KL divergence that a
small change of the weight causes (per token).

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
    outputs: Float[Tensor, "out out"] | None = None

    @staticmethod
    def empty(columns: int, device: torch.device | str = "cpu") -> "Moments":
        return Moments(torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device), 0)

    def hessian(self) -> Square:
        """E[x x^T], uncentred; zero when nothing was seen."""
        return self.second / max(self.count, 1)


    def to(self, device: torch.device | str) -> "Moments":
        outputs = None if self.outputs is None else self.outputs.to(device)
        return Moments(self.second.to(device), self.first.to(device), self.count, outputs)


def observe(moments: Moments, x: Float[Tensor, "tok in"]) -> Moments:
    """`moments` after also seeing the rows of `x`; accumulated in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, moments.second.dtype))
    return Moments(moments.second + x.T @ x, moments.first + x.sum(0), moments.count + x.shape[0], moments.outputs)


def merge(a: Moments, b: Moments) -> Moments:
    """Both together; `outputs` are means, weighted by tokens, and lost where one has none."""
    outputs = None
    if a.outputs is not None and b.outputs is not None:
        share = a.count / max(a.count + b.count, 1)
        outputs = share * a.outputs + (1 - share) * b.outputs
    return Moments(a.second + b.second, a.first + b.first, a.count + b.count, outputs)
