"""Weighted k-means: seeded, deterministic, chunked; ours because the quantizer's time and quality live here.

Seeding draws new centroids in batches with probability importance * distance^2 to those already drawn (k-means++ whose
batches double, so that 65536 seeds cost one pass). Lloyd's iterations sum clusters in sorted order, never by atomic adds, so the
same arguments give the same bits. An empty cluster moves to the point that costs most.

For large tables, where the exact search is slow (no library of kernels, or a GPU), each point is compared with the centroids around its
*cell* only (`_search`): about an eighth of the work; the objective still never rises, because the centroid a point already has stays a
candidate. Rounding itself always searches exactly.
"""

import itertools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.numerics.nearest import is_native, nearest
from voroq.shapes import Vectors

SEEDING_SAMPLE = 8
"""Points per centroid that the seeding looks at."""
TRAINING_SAMPLE = 64
"""Points per centroid that the first two thirds of the iterations look at, where there are more than twice as many."""
CELLS_FROM = 4096
"""Smallest table for which the search is restricted to cells."""


def kmeans(
    points: Vectors,
    importance: Float[Tensor, "n"],
    k: int,
    rng: torch.Generator,
    *,
    steps: int = 25,
    restarts: int = 0,
    start: Float[Tensor, "k dim"] | None = None,
) -> Float[Tensor, "k dim"]:
    """Centroids [k dim] that lower sum_i importance_i * |point_i - nearest centroid|^2: the best of 1 + `restarts` seedings.

    `rng` is a CPU generator; `start` replaces the (first) seeding; stops early once the objective gains less than 1e-4 of itself.
    """
    importance = importance.clamp_min(0) / importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)
    best = _once(points, importance, k, rng, steps, start)
    if restarts:
        least = _objective(points, importance, best)
    for _ in range(restarts):
        found = _once(points, importance, k, rng, steps, None)
        cost = _objective(points, importance, found)
        if cost < least:
            best, least = found, cost
    return best


def _objective(points: Vectors, importance: Float[Tensor, "n"], centroids: Float[Tensor, "k dim"]) -> float:
    return float(((points - centroids[nearest(points, centroids)]).square().sum(1) * importance).double().sum())


def _once(
    points: Vectors, importance: Float[Tensor, "n"], k: int, rng: torch.Generator, steps: int, start: Float[Tensor, "k dim"] | None
) -> Float[Tensor, "k dim"]:
    """Lloyd's iterations from one seeding."""
    centroids = seed(points, importance, k, rng) if start is None else start.clone()
    if points.shape[0] > 2 * TRAINING_SAMPLE * k:
        chosen = torch.randperm(points.shape[0], generator=rng)[: TRAINING_SAMPLE * k].to(points.device)
        centroids = _lloyd(points[chosen], importance[chosen], centroids, steps - steps // 3)
        steps = max(1, steps // 3)
    return _lloyd(points, importance, centroids, steps)


def _lloyd(points: Vectors, importance: Float[Tensor, "n"], centroids: Float[Tensor, "k dim"], steps: int) -> Float[Tensor, "k dim"]:
    codes = torch.zeros(points.shape[0], dtype=torch.long, device=points.device)
    last = float("inf")
    for step in range(steps):
        exactly = centroids.shape[0] < CELLS_FROM or is_native(points)
        codes = nearest(points, centroids) if exactly else _search(points, centroids, codes if step else None)
        cost = (points - centroids[codes]).square().sum(1) * importance
        total = float(cost.double().sum())
        centroids = _means(points, importance, codes, cost, centroids)
        if total >= last * (1 - 1e-4):
            break
        last = total
    return centroids


def seed(points: Vectors, importance: Float[Tensor, "n"], k: int, rng: torch.Generator) -> Float[Tensor, "k dim"]:
    """`k` of the points (repeated when there are fewer), drawn by importance * squared distance in growing batches."""
    limit = max(SEEDING_SAMPLE * k, 16384)
    if points.shape[0] > limit:
        chosen = torch.randperm(points.shape[0], generator=rng)[:limit].to(points.device)
        points, importance = points[chosen], importance[chosen]
    chosen = _draw(importance, 1, rng)
    cost = (points - points[chosen]).square().sum(1) * importance
    while len(chosen) < k:
        batch = _draw(cost, min(max(1, len(chosen) // 8), k - len(chosen)), rng)
        chosen = torch.cat([chosen, batch])
        closest = points[batch[nearest(points, points[batch])]]
        cost = torch.minimum(cost, (points - closest).square().sum(1) * importance)
    return points[chosen].clone()


def _draw(mass: Float[Tensor, "n"], count: int, rng: torch.Generator) -> Int[Tensor, "m"]:
    """`count` different indices with probability proportional to mass (Gumbel top-k); any index once the mass is used up."""
    noise = torch.rand(mass.shape[0], generator=rng, dtype=torch.float64).to(mass.device)
    keys = mass.double().clamp_min(1e-300).log() - (-noise.clamp(1e-18, 1 - 1e-16).log()).log()
    chosen = keys.topk(min(count, mass.shape[0])).indices
    return chosen.repeat(-(-count // len(chosen)))[:count]


def _means(
    points: Vectors, importance: Float[Tensor, "n"], codes: Int[Tensor, "n"], cost: Float[Tensor, "n"], centroids: Float[Tensor, "k dim"]
) -> Float[Tensor, "k dim"]:
    """Weighted means of the clusters; an empty or weightless cluster takes the place of one of the costliest points."""
    k = centroids.shape[0]
    order = torch.argsort(codes, stable=True)
    lengths = torch.bincount(codes, minlength=k)
    weighted = torch.cat([points * importance[:, None], importance[:, None]], dim=1)[order]
    sums = torch.segment_reduce(weighted, "sum", lengths=lengths, axis=0)
    mass = sums[:, -1:]
    means = torch.where(mass > 0, sums[:, :-1] / mass.clamp_min(torch.finfo(mass.dtype).tiny), centroids)
    empty = (mass[:, 0] <= 0).nonzero()[:, 0]
    if len(empty):
        costly = cost.topk(min(len(empty), cost.shape[0])).indices
        means[empty[: len(costly)]] = points[costly]
    return means


def _search(points: Vectors, centroids: Float[Tensor, "k dim"], codes: Int[Tensor, "n"] | None) -> Int[Tensor, "n"]:
    """Nearest centroid of each point among those around its cell, and the one it has already.

    Cells are the regions of every so many-th centroid, about 4 sqrt(k) of them; a cell's candidates are the k/8 centroids nearest to
    the mean of its points.
    """
    k = centroids.shape[0]
    anchors = centroids[:: max(1, math.isqrt(k) // 4)]
    cell = nearest(points, anchors)
    order = torch.argsort(cell, stable=True)
    bounds = [0, *torch.bincount(cell, minlength=len(anchors)).cumsum(0).tolist()]
    found = torch.empty_like(cell)
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        members = order[start:stop]
        inside = points[members]
        candidates = (centroids - inside.mean(0)).square().sum(1).topk(k // 8, largest=False).indices.sort().values
        found[members] = candidates[nearest(inside, centroids[candidates])]
    if codes is None:
        return found
    better = (points - centroids[found]).square().sum(1) < (points - centroids[codes]).square().sum(1)
    return torch.where(better, found, codes)
