"""The scalar grid {0, 1, ..., 2**bits - 1}. Scale and zero point belong to the band that uses it, one pair per output row."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from voroq.shapes import Codes, Vectors


@dataclass(frozen=True)
class Grid:
    bits: int

    dim = 1
    exact = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"a grid has 1 to 8 bits, got {self.bits}")

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.bits,)

    def encode(self, v: Vectors, metric: Float[Tensor, "dim dim"] | None = None) -> Codes:
        return v.round().clamp(0, 2**self.bits - 1).long()

    def decode(self, codes: Codes) -> Vectors:
        return codes.float()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Grid":
        return self
