"""A new order of the input columns: column p of w' is column perm[p] of w."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.shapes import Matrix, Square
from voroq.transform.base import Inner


@dataclass(frozen=True)
class Permute:
    perm: Int[Tensor, "in"]

    @property
    def inverse(self) -> Tensor:
        return torch.argsort(self.perm)

    def weight(self, w: Matrix) -> Matrix:
        return w[:, self.perm]

    def hessian(self, h: Square) -> Square:
        return h[self.perm][:, self.perm]

    def restore(self, w: Matrix) -> Matrix:
        return w[:, self.inverse]

    def linear(self, x: Float[Tensor, "*batch in"], inner: Inner) -> Tensor:
        return inner(x[..., self.perm])

    def tensors(self) -> dict[str, Tensor]:
        return {"perm": self.perm}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Permute":
        return Permute(tensors["perm"])
