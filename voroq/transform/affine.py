"""One scale and one shift per input column: w' = (w - shift) / scale. VPTQ stores them as weight_scale and weight_bias.

The Hessian follows: an error e' in the new basis is e = e' * scale in the old one, so H' = diag(scale) H diag(scale). The
reference implementation forgets this and pays for it.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from voroq.shapes import Matrix, Square
from voroq.transform.base import Inner


@dataclass(frozen=True)
class ColumnAffine:
    scale: Float[Tensor, "in"]
    shift: Float[Tensor, "in"]

    def weight(self, w: Matrix) -> Matrix:
        return (w - self.shift) / self.scale

    def hessian(self, h: Square) -> Square:
        return h * self.scale[:, None] * self.scale

    def restore(self, w: Matrix) -> Matrix:
        return w * self.scale + self.shift

    def linear(self, x: Float[Tensor, "*batch in"], inner: Inner) -> Tensor:
        return inner(x * self.scale) + (x @ self.shift)[..., None]

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "shift": self.shift}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "ColumnAffine":
        return ColumnAffine(tensors["scale"], tensors["shift"])
