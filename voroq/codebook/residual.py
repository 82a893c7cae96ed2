"""Residual tables: a word is the sum of one centroid from each stage.

Encoding is greedy, stage by stage, or a beam search that carries the `beam` best partial sums from stage to stage: with two stages,
the best main centroids are each completed with their best residual. A beam as wide as the first table is an exhaustive search of a
pair; narrower ones may miss the nearest word, so `exact` is False: about a fifth of the words of a trained pair do not re-encode to
themselves greedily. (AQLM's beam search, Egiazarian et al. 2024, on one vector.)
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.codebook.table import Table
from voroq.numerics.nearest import nearest, nearest_few
from voroq.shapes import Codes, Vectors

CHUNK = 1 << 18
"""Partial sums a beam search holds at once."""


@dataclass(frozen=True)
class Residual:
    stages: tuple[Table, ...]
    beam: int = field(default=1, compare=False)
    """Partial sums that `encode` keeps; how to search, not what is stored."""

    exact = False

    @property
    def dim(self) -> int:
        return self.stages[0].dim

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width for stage in self.stages for width in stage.widths)

    def encode(self, v: Vectors, metric: Float[Tensor, "dim dim"] | None = None) -> Codes:
        if self.beam > 1:
            root = None if metric is None else torch.linalg.cholesky(metric)
            tables = [stage.centroids if root is None else stage.centroids @ root for stage in self.stages]
            parts = (v if root is None else v @ root).split(max(1, CHUNK // self.beam))
            return torch.cat([_search(part, tables, self.beam) for part in parts])
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
        return replace(self, stages=tuple(Table(tensors[f"centroids_{s}"]) for s in range(len(self.stages))))


def _search(v: Vectors, tables: list[Tensor], beam: int) -> Codes:
    """Codes of the nearest sum found when the `beam` best partial sums are carried from stage to stage."""
    left, codes = v[:, None], torch.zeros(v.shape[0], 1, 0, dtype=torch.long, device=v.device)  # [n b dim], [n b s]
    for table in tables[:-1]:
        left, codes = _extend(left, codes, nearest_few(left.flatten(0, 1), table, min(beam, table.shape[0])), table)
        if left.shape[1] > beam:
            best = left.square().sum(2).topk(beam, largest=False).indices
            left, codes = _pick(left, best), _pick(codes, best)
    left, codes = _extend(left, codes, nearest(left.flatten(0, 1), tables[-1])[:, None], tables[-1])
    return _pick(codes, left.square().sum(2).argmin(1, keepdim=True))[:, 0]


def _extend(
    left: Float[Tensor, "n b dim"], codes: Int[Tensor, "n b s"], found: Int[Tensor, "m few"], table: Float[Tensor, "k dim"]
) -> tuple[Float[Tensor, "n c dim"], Int[Tensor, "n c t"]]:
    """Every partial sum with each of its `found` centroids added: c = b * few."""
    found = found.unflatten(0, left.shape[:2])  # [n b few]
    left = left[:, :, None] - table[found]
    codes = torch.cat([codes[:, :, None].expand(-1, -1, found.shape[2], -1), found[..., None]], dim=3)
    return left.flatten(1, 2), codes.flatten(1, 2)


def _pick(t: Tensor, which: Int[Tensor, "n b"]) -> Tensor:
    """Rows `which` of the second axis of `t` [n c x]."""
    return t.gather(1, which[..., None].expand(-1, -1, t.shape[2]))
