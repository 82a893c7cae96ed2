"""y = x @ w.T by dequantizing w first. Slow, right, and for every spec; the truth that other kernels are compared with.

w is decoded and scaled in float32 and rounded once, to the type of x.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.packed.base import Packed, Spec
from voroq.packed.format import unpack


def supports(spec: Spec, x: Float[Tensor, "*batch in"]) -> bool:
    return True


def matmul(x: Float[Tensor, "*batch in"], packed: Packed) -> Float[Tensor, "*batch out"]:
    """Differentiable with respect to `x`."""
    return torch.nn.functional.linear(x, weight(packed, x.dtype))


def weight(packed: Packed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    return unpack(packed).dequantize().to(dtype)
