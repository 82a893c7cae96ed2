"""One scale and one shift per output row: w' = (w - shift) / scale. VPTQ's `norm_dim` 1 stores them as weight_scale and weight_bias.

An error e' of row o is e = e' * scale[o] outside, so the proxy loss of each row is scale[o]**2 times that inside. Rows do not
share a word's error with each other in the Hessian, so the best rounding of a row does not depend on its factor: H' = H.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from voroq.shapes import Matrix, Square
from voroq.transform.base import Inner


@dataclass(frozen=True)
class RowAffine:
    scale: Float[Tensor, "out"]
    shift: Float[Tensor, "out"]

    def weight(self, w: Matrix) -> Matrix:
        return (w - self.shift[:, None]) / self.scale[:, None]

    def hessian(self, h: Square) -> Square:
        return h

    def restore(self, w: Matrix) -> Matrix:
        return w * self.scale[:, None] + self.shift[:, None]

    def linear(self, x: Float[Tensor, "*batch in"], inner: Inner) -> Tensor:
        return inner(x) * self.scale + x.sum(dim=-1, keepdim=True) * self.shift

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "shift": self.shift}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "RowAffine":
        return RowAffine(tensors["scale"], tensors["shift"])
