"""Words: the protocol every codebook obeys, and its laws.

A codebook turns vectors of `dim` weights into integers and back. Several integers may stand for one vector (a residual
code has one per stage); each is a *stream* with its own width in bits.

Laws, checked for every codebook in `laws_test.py`:
    0 <= codes[:, s] < 2 ** widths[s]
    exact  =>  encode(v) is the nearest word by brute force, and decode(encode(decode(c))) == decode(c)
    greedy =>  each stage is nearest given the stages before it
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from voroq.shapes import Codes, Vectors


@runtime_checkable
class Codebook(Protocol):
    dim: int
    """Weights per vector."""
    widths: tuple[int, ...]
    """Bits of each stream; `sum(widths) / dim` are the index bits per weight."""
    exact: bool
    """Whether `encode` really finds the nearest word."""

    def encode(self, v: Vectors, metric: Float[Tensor, "dim dim"] | None = None) -> Codes:
        """Codes of the words nearest to `v` [n dim] in `metric` (Euclidean when None)."""

    def decode(self, codes: Codes) -> Vectors:
        """Words [n dim] that `codes` [n s] stand for."""

    def tensors(self) -> dict[str, Tensor]:
        """The real-valued tensors that must be stored, by name; `with_tensors` puts narrowed or tuned ones back."""

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Codebook": ...
