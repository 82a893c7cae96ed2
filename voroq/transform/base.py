"""Bases: invertible changes of the matrix under which quantization is easier, and the cost they leave at inference.

Laws (`laws_test.py`), for every transform t:
    t.restore(t.weight(w)) == w
    t.linear(x, lambda x: x @ t.weight(w).T) == x @ w.T
    tr(E H E.T) is the same on both sides: E = w - restore(w'), E' = weight(w) - w', with H' = hessian(H)
    (`RowAffine` only scales each row's share of it, which leaves every row's best rounding what it was)
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from voroq.shapes import Matrix, Square

Inner = Callable[[Tensor], Tensor]


@runtime_checkable
class Transform(Protocol):
    def weight(self, w: Matrix) -> Matrix:
        """`w` [out in] in the new basis."""

    def hessian(self, h: Square) -> Square:
        """`h` [in in] such that the proxy loss of an error is unchanged."""

    def restore(self, w: Matrix) -> Matrix:
        """Inverse of `weight`."""

    def linear(self, x: Float[Tensor, "*batch in"], inner: Inner) -> Tensor:
        """`x @ w.T` for the original w, where `inner(x')` multiplies with the transformed one."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that must be stored, by name."""

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Transform": ...
