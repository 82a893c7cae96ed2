"""A union of pyramids: words are scale[j] * y, with y any integer vector whose magnitudes sum to pulses[j]. No table of words exists.

All points of all levels are numbered through, level after level in the split or the class order, and one integer of whole bits names a
word. The numbers that are left over all name the zero vector. With one scale per level instead of a unit direction and a gain, the
nearest point of a level is an exact projection, and the nearest word the best of them. (van der Ouderaa et al. 2024, arXiv 2410.16926,
have one level of pulses and separate gains: `GainShape`. Letting the pulses differ by level wastes no fraction of a bit.)
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq import native
from voroq.numerics.bits import merge_streams, split_streams
from voroq.numerics.class_code import LONGEST, class_index_of, class_vector_of
from voroq.numerics.nearest import is_native
from voroq.numerics.pyramid import count, index_of, project, vector_of
from voroq.shapes import Codes, Vectors

STREAM = 32
"""Bits of a stream; longer numbers are split, low bits first."""


ORDERS = {"split-v1": (index_of, vector_of), "class-v1": (class_index_of, class_vector_of)}
"""How the points of a pyramid are numbered, and back, by the name in files. The class order has vectors of up to eight entries."""
SPLIT = "split-v1"


def stream_widths(bits: int) -> tuple[int, ...]:
    """Bits of the streams of a number of `bits` bits."""
    return (bits,) if bits <= STREAM else (STREAM, bits - STREAM)


@dataclass(frozen=True)
class Pulses:
    """The words of `Pyramids`, spelled out: codes are the level and every entry of y, raised by the most pulses. Nothing is looked up and
    nothing numbered, so this is the form in which rounding goes over a matrix again and again."""

    dim: int
    pulses: tuple[int, ...]
    scales: Float[Tensor, "levels"]

    exact = True

    def __post_init__(self) -> None:
        if len(self.pulses) != self.scales.shape[0] or not self.pulses or min(self.pulses) < 1:
            raise ValueError(f"every level needs at least one pulse and a scale, got {self.pulses} and {self.scales.shape[0]} scales")

    @property
    def widths(self) -> tuple[int, ...]:
        return (len(self.pulses).bit_length(), *[(2 * max(self.pulses)).bit_length()] * self.dim)

    def encode(self, v: Vectors, metric: Float[Tensor, "dim dim"] | None = None) -> Codes:
        """The nearest word; in a `metric`, the best that moving single pulses finds."""
        level, y = self._nearest(v) if metric is None else self._descend(v, metric)
        return self.join(level, y.long())

    def decode(self, codes: Codes) -> Vectors:
        level, y = self.split(codes)
        return torch.cat([self.scales, self.scales.new_zeros(1)])[level][:, None] * y.to(self.scales)

    def join(self, level: Int[Tensor, "n"], y: Int[Tensor, "n dim"]) -> Codes:
        """The code of y on a level; level len(pulses) is the zero vector."""
        return torch.cat([level[:, None], y + max(self.pulses)], dim=1).to(torch.int16)

    def split(self, codes: Codes) -> tuple[Int[Tensor, "n"], Int[Tensor, "n dim"]]:
        """Inverse of `join`."""
        return codes[:, 0].long(), codes[:, 1:].long() - max(self.pulses)

    def tensors(self) -> dict[str, Tensor]:
        return {"scales": self.scales}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Pulses":
        return replace(self, scales=tensors["scales"])

    def fitted(self, v: Vectors, codes: Codes) -> Float[Tensor, "levels"]:
        """The scales that bring the words of `codes` nearest to `v`; a level nothing uses keeps its own."""
        (level, y), levels = self.split(codes), len(self.pulses)
        y = y.to(v)
        sums = [v.new_zeros(levels + 1).double().index_add_(0, level, t.double())[:levels] for t in ((v * y).sum(1), y.square().sum(1))]
        return torch.where(sums[1] > 0, (sums[0] / sums[1].clamp_min(1)).to(self.scales), self.scales)

    def is_native(self, v: Vectors) -> bool:
        """Whether the library of kernels searches these words for `v`."""
        known = self.dim in native.PYRAMID_DIMS and max(self.pulses) <= native.MOST_PULSES and len(self.pulses) <= native.MOST_LEVELS
        return known and is_native(v)

    def _nearest(self, v: Vectors) -> tuple[Int[Tensor, "n"], Vectors]:
        """Level and y of the nearest word. Level len(pulses) is the zero vector.

        Points of level j lie on the facets sum |x_i| = scale[j] * pulses[j], which are | ||v||_1 - that | / sqrt(dim) away: first the level
        that could be nearest, then only those that could be nearer still. Sums are taken in float64, where their order hardly ever matters,
        so that the library finds the same.
        """
        levels, scales = len(self.pulses), self.scales.to(v)
        if self.is_native(v):
            return native.project(v, self.pulses, scales)
        pulses = torch.tensor(self.pulses, device=v.device)
        bound = (v.abs().sum(1, keepdim=True) - (scales * pulses).abs()).square() / self.dim  # [n levels]
        error = torch.full((v.shape[0], levels + 1), torch.inf, dtype=torch.float64, device=v.device)
        error[:, levels] = v.square().sum(1, dtype=torch.float64)
        found = torch.zeros(v.shape[0], levels + 1, dtype=torch.long, device=v.device)
        words = [torch.zeros(1, self.dim, dtype=v.dtype, device=v.device)]
        first = torch.zeros_like(bound, dtype=torch.bool).scatter_(1, bound.argmin(1, keepdim=True), True)
        for chosen in (lambda: first, lambda: ~first & (bound < error.amin(1, keepdim=True))):
            row, level = chosen().nonzero(as_tuple=True)
            scale, here = scales[level], v[row]
            y = project(here / scale[:, None], pulses[level])
            error[row, level] = (here - y * scale[:, None]).square().sum(1, dtype=torch.float64)
            found[row, level] = torch.arange(row.shape[0], device=v.device) + sum(map(len, words))
            words.append(y)
        best = error.argmin(1)
        return best, torch.cat(words)[found.gather(1, best[:, None])[:, 0]]

    def _descend(self, v: Vectors, metric: Float[Tensor, "dim dim"]) -> tuple[Int[Tensor, "n"], Vectors]:
        """Level and y of the best word that moving single pulses finds, from each level's nearest point in the Euclidean sense.

        Points of level j where all signs are v's are at least ( ||v||_1 - scale[j] pulses[j] )^2 / (s inv(metric) s^T) away, s the signs:
        levels are tried by that bound, as long as it is below the best word found.
        """
        scales, levels = self.scales.to(v), len(self.pulses)
        pulses = torch.tensor(self.pulses, device=v.device)
        signs = torch.where(v < 0, -1.0, 1.0).to(v)
        reach = ((signs @ torch.linalg.inv(metric.double()).to(v)) * signs).sum(1, keepdim=True)
        bound, order = ((v.abs().sum(1, keepdim=True) - (scales * pulses).abs()).square() / reach).sort(1)
        level, y = torch.full((v.shape[0],), levels, device=v.device), torch.zeros_like(v)
        least = ((v @ metric) * v).sum(1)
        for tried in range(levels):
            row = (bound[:, tried] < least).nonzero()[:, 0]
            if not row.numel():
                break
            own = order[row, tried]
            scale = scales[own][:, None]
            x = v[row] / scale
            found = move_pulses(x, project(x, pulses[own]), metric)
            error = v[row] - found * scale
            cost = ((error @ metric) * error).sum(1)
            better = cost < least[row]
            row = row[better]
            least[row], level[row], y[row] = cost[better], own[better], found[better]
        return level, y


def move_pulses(x: Vectors, y: Vectors, metric: Float[Tensor, "dim dim"], steps: int = 24) -> Vectors:
    """`y` after moving one pulse at a time, always the move that lowers (x - y) metric (x - y)^T most, until none does.

    A move takes a pulse from i (towards zero) and puts one on k (away from zero, either way where y_k is zero); i = k turns a sign.
    """
    y, rows, dim = y.clone(), torch.arange(x.shape[0], device=x.device), x.shape[1]
    diagonal = metric.diagonal()
    turn = torch.eye(dim, dtype=torch.bool, device=x.device)
    for _ in range(steps):
        here = y[rows]
        pull = (x[rows] - here) @ metric
        off = here.sign()  # taking from i changes y_i by -off_i, and the pull on k to `then`
        then = pull[:, None, :] + off[:, :, None] * metric  # [n i k]
        on = torch.where(here[:, None, :] == 0, torch.where(then < 0, -1.0, 1.0).to(x), off[:, None, :])  # putting on k changes y_k by on
        cost = (2 * off * pull + diagonal)[:, :, None] + diagonal - 2 * on * then
        cost = torch.where(turn, (4 * off * pull + 4 * diagonal)[:, :, None], cost)
        legal = (here != 0)[:, :, None] & ~(turn & (here.abs() != 1)[:, :, None])
        cost = torch.where(legal, cost, torch.inf).reshape(rows.shape[0], -1)
        least, move = cost.min(1)
        better = least < -1e-6 * diagonal.mean()
        rows, move, off = rows[better], move[better], off[better]
        on = on[better].flatten(1).gather(1, move[:, None])[:, 0]
        if not rows.numel():
            break
        i, k = move // dim, move % dim
        taken = off.gather(1, i[:, None])[:, 0]
        y[rows, i] -= taken
        y[rows, k] += torch.where(i == k, -taken, on)
    return y


@dataclass(frozen=True)
class Pyramids:
    """Words scale[j] * y, y in P(dim, pulses[j]), under one number of `bits` bits, and the zero vector under all numbers left over."""

    dim: int
    pulses: tuple[int, ...]
    scales: Float[Tensor, "levels"]
    bits: int = field(default=0)
    """Width of a number; the least that leaves a number for zero unless given."""
    order: str = SPLIT
    """A key of `ORDERS`."""

    exact = True

    def __post_init__(self) -> None:
        points = [count(self.dim, k) for k in self.pulses]
        bits = self.bits or sum(points).bit_length()
        if max(points) >= 1 << 63 or not sum(points) < 1 << bits <= 1 << 64:
            raise ValueError(
                f"pyramids of dimension {self.dim} with {self.pulses} pulses have {sum(points)} points, which with zero do not fit into "
                f"{bits} bits (64 at most, and 63 for one pyramid)"
            )
        if self.order not in ORDERS or (self.order != SPLIT and self.dim > LONGEST):
            raise ValueError(f"vectors of {self.dim} weights have no order {self.order!r}; the class order takes up to {LONGEST}")
        object.__setattr__(self, "bits", bits)

    @property
    def widths(self) -> tuple[int, ...]:
        return stream_widths(self.bits)

    @cached_property
    def spelled(self) -> Pulses:
        """The same words as `Pulses`."""
        return Pulses(self.dim, self.pulses, self.scales)

    def encode(self, v: Vectors, metric: Float[Tensor, "dim dim"] | None = None) -> Codes:
        return self.number(self.spelled.encode(v, metric))

    def decode(self, codes: Codes) -> Vectors:
        return self.spelled.decode(self.spell(codes))

    def number(self, spelled: Int[Tensor, "n t"]) -> Codes:
        """Codes of `Pulses` as numbers, cut into streams."""
        level, y = self.spelled.split(spelled)
        return split_streams(ORDERS[self.order][0](y) + self._starts(level.device)[level], self.widths)  # the zero vector's index is 0

    def spell(self, codes: Codes) -> Int[Tensor, "n t"]:
        """Inverse of `number`."""
        index = merge_streams(codes, self.widths)
        starts = self._starts(index.device)
        # numbers are unsigned: turning the highest bit makes signed comparison order them
        level = torch.searchsorted(starts ^ -(1 << 63), index ^ -(1 << 63), right=True) - 1
        pulses = torch.tensor([*self.pulses, 0], device=index.device)[level]
        return self.spelled.join(level, ORDERS[self.order][1](torch.where(pulses > 0, index - starts[level], 0), pulses, self.dim))

    def tensors(self) -> dict[str, Tensor]:
        return {"scales": self.scales}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Pyramids":
        return replace(self, scales=tensors["scales"])

    def _starts(self, device: torch.device) -> Int[Tensor, "levels_and_zero"]:
        """The first number of every level, then the first of zero, as int64 with the bits of uint64."""
        starts = accumulate((count(self.dim, k) for k in self.pulses), initial=0)
        return torch.tensor([start - (1 << 64) if start >= 1 << 63 else start for start in starts], device=device)
