"""Residual tables: a word is the sum of one centroid from each stage.

Encoding is greedy, stage by stage, so `exact` is False: about a fifth of the words of a trained pair do not re-encode to
themselves.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.codebook.table import Table
from voroq.shapes import Codes, Vectors


@dataclass(frozen=True)
class Residual:
    stages: tuple[Table, ...]

    exact = False

    @property
    def dim(self) -> int:
        return self.stages[0].dim

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width for stage in self.stages for width in stage.widths)

    def encode(self, v: Vectors, metric: Float[Tensor, "dim dim"] | None = None) -> Codes:
        codes = []
        for stage in self.stages:
            codes.append(stage.encode(v, metric))
            v = v - stage.decode(codes[-1])
        return torch.cat(codes, dim=1)

    def decode(self, codes: Codes) -> Vectors:
        total = self.stages[0].decode(codes[:, :1])
        for s, stage in enumerate(self.stages[1:], start=1):
            total = total + stage.decode(codes[:, s : s + 1])
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {f"centroids_{s}": stage.centroids for s, stage in enumerate(self.stages)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Residual":
        return Residual(tuple(Table(tensors[f"centroids_{s}"]) for s in range(len(self.stages))))
