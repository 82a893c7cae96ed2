"""A lookup table: k centroids of dim weights. Encoding is an exact nearest-neighbour search."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.numerics.nearest import CHUNK, nearest
from voroq.numerics.rows import rows
from voroq.shapes import Codes, Vectors


@dataclass(frozen=True)
class Table:
    """`centroids` [k dim], k a power of two. One stream of log2(k) bits."""

    centroids: Float[Tensor, "k dim"]

    exact = True

    def __post_init__(self) -> None:
        k = self.centroids.shape[0]
        if k & (k - 1) or k < 2:
            raise ValueError(f"a table has a power of two of centroids, at least 2; got {k}")

    @property
    def dim(self) -> int:
        return self.centroids.shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.centroids.shape[0].bit_length() - 1,)

    def encode(self, v: Vectors, metric: Float[Tensor, "dim dim"] | None = None) -> Codes:
        return nearest(v, self.centroids, metric=metric)[:, None]

    def decode(self, codes: Codes) -> Vectors:
        return rows(self.centroids, codes[:, 0])

    def reach(self) -> Float[Tensor, "k"]:
        """Half the distance from every word to the next, squared: what is nearer to a word than that is nearest to it."""
        gaps = [
            torch.cdist(part, self.centroids, compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False).values[:, 1]
            for part in self.centroids.split(max(1, CHUNK // self.centroids.shape[0]))
        ]
        return (torch.cat(gaps) / 2).square()

    def tensors(self) -> dict[str, Tensor]:
        return {"centroids": self.centroids}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Table":
        return Table(tensors["centroids"])
