"""Transforms in sequence. An empty chain is the identity."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from voroq.shapes import Matrix, Square
from voroq.transform.base import Inner, Transform


@dataclass(frozen=True)
class Chain:
    steps: tuple[Transform, ...] = ()

    def weight(self, w: Matrix) -> Matrix:
        for step in self.steps:
            w = step.weight(w)
        return w

    def hessian(self, h: Square) -> Square:
        for step in self.steps:
            h = step.hessian(h)
        return h

    def restore(self, w: Matrix) -> Matrix:
        for step in reversed(self.steps):
            w = step.restore(w)
        return w

    def linear(self, x: Float[Tensor, "*batch in"], inner: Inner) -> Tensor:
        for step in reversed(self.steps):
            inner = _around(step, inner)
        return inner(x)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, step in enumerate(self.steps) for name, t in step.tensors().items()}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Chain":
        own = [{name.split(".", 1)[1]: t for name, t in tensors.items() if name.split(".", 1)[0] == str(i)} for i in range(len(self.steps))]
        return Chain(tuple(step.with_tensors(part) for step, part in zip(self.steps, own, strict=True)))


def _around(step: Transform, inner: Inner) -> Inner:
    return lambda x: step.linear(x, inner)
