"""Products with packed weights. `matmul` takes the first entry of KERNELS that supports the spec and the input."""

from jaxtyping import Float
from torch import Tensor

from voroq.kernels import reference
from voroq.packed.base import Packed

KERNELS = {"reference": reference}
"""Fastest first; `reference` is last and supports everything."""


def matmul(x: Float[Tensor, "*batch in"], packed: Packed) -> Float[Tensor, "*batch out"]:
    """`x @ w.T` for the linear w [out in] stored as `packed`, in the type of `x`."""
    kernel = next(kernel for kernel in KERNELS.values() if kernel.supports(packed.spec, x))
    return kernel.matmul(x, packed)
