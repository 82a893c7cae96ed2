"""Moments of a layer's inputs, summed over calibration tokens, and of the gradients at its outputs.

    second = sum x x^T  [in in]      first = sum x  [in]      count = tokens
    outputs = E[g g^T]  [out out]    g = d log q(sampled token) / d y, with the model's own answers sampled, or None
    groups = E[mean of g_j^2 over the rows j of a group * x x^T]  [n in in], for n even groups of rows, or None

`second` and `outputs` are the two factors of the Fisher matrix of the layer's weight; half its quadratic form is the KL divergence that a
small change of the weight causes (per token). `groups` keep of that matrix what rows do not share, and which inputs meet which gradients.

Law: merge(observe(empty, a), observe(empty, b)) == observe(empty, cat(a, b)) up to rounding.
"""

from dataclasses import dataclass, replace

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
    groups: Float[Tensor, "n in in"] | None = None

    @staticmethod
    def empty(columns: int, device: torch.device | str = "cpu") -> "Moments":
        return Moments(torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device), 0)

    def hessian(self) -> Square:
        """E[x x^T], uncentred; zero when nothing was seen."""
        return self.second / max(self.count, 1)


    def to(self, device: torch.device | str) -> "Moments":
        outputs, groups = (None if t is None else t.to(device) for t in (self.outputs, self.groups))
        return Moments(self.second.to(device), self.first.to(device), self.count, outputs, groups)


def observe(moments: Moments, x: Float[Tensor, "tok in"]) -> Moments:
    """`moments` after also seeing the rows of `x`; accumulated in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, moments.second.dtype))
    seen = {"second": moments.second + x.T @ x, "first": moments.first + x.sum(0), "count": moments.count + x.shape[0]}
    return replace(moments, **seen)


def merge(a: Moments, b: Moments) -> Moments:
    """Both together; what stands on gradients is a mean, weighted by tokens, and lost where one has none."""
    share = a.count / max(a.count + b.count, 1)
    outputs, groups = blend(a.outputs, b.outputs, share), blend(a.groups, b.groups, share)
    return Moments(a.second + b.second, a.first + b.first, a.count + b.count, outputs, groups)


def blend(a: Tensor | None, b: Tensor | None, share: float) -> Tensor | None:
    """`share` of `a` and the rest of `b`; None where one is missing."""
    return None if a is None or b is None else share * a + (1 - share) * b
