"""Spending a budget of bits: one setting per site, so that the sum of costs is least and the sum of bits fits.

A knapsack with a choice per site, solved by dynamic programming over the frontier of (bits, cost) that no other combination of the
sites so far beats in both. Exact while the frontier has at most `FRONTIER` points; beyond that it is thinned to as many, evenly over the
bits, which for a model of hundreds of sites costs less than the menu's own steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from voroq.methods import Method

FRONTIER = 2048
"""Combinations kept from site to site."""


@dataclass(frozen=True)
class Choice:
    """A setting of one site, or of several that are chosen together: the bits stored and what it is expected to cost."""

    methods: tuple[Method, ...]
    bits: int
    cost: float


def spend(menus: Sequence[Sequence[Choice]], budget: float | int) -> list[Choice] | None:
    """For every site a choice of its menu, with the least total cost at no more than `budget` bits. None if not even the cheapest fit."""
    menus = [useful(menu) for menu in menus]
    least = [min(choice.bits for choice in menu) for menu in menus]
    room = float(budget - sum(least))
    if room < 0:
        return None
    bits, costs = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for menu, low in zip(menus, least, strict=True):
        own = np.array([choice.bits - low for choice in menu], dtype=np.float64), np.array([choice.cost for choice in menu])
        all_bits, all_costs = (bits[:, None] + own[0]).ravel(), (costs[:, None] + own[1]).ravel()
        kept = _frontier(all_bits, all_costs, room)
        trail.append((kept // len(menu), kept % len(menu)))
        bits, costs = all_bits[kept], all_costs[kept]
    at = int(costs.argmin())
    picked: list[Choice] = []
    for menu, (before, chosen) in zip(reversed(menus), reversed(trail), strict=True):
        picked.append(menu[int(chosen[at])])
        at = int(before[at])
    return picked[::-1]


def useful(menu: Sequence[Choice]) -> list[Choice]:
    """The choices that no other beats in both bits and cost."""
    bits, costs = np.array([choice.bits for choice in menu], dtype=np.float64), np.array([choice.cost for choice in menu])
    return [menu[int(place)] for place in _frontier(bits, costs, np.inf)]


def _frontier(bits: np.ndarray, costs: np.ndarray, room: float) -> np.ndarray:
    """Places of the points within `room` that cost less than every point of as many or fewer bits, by rising bits."""
    order = np.lexsort((costs, bits))
    order = order[bits[order] <= room]
    cheapest = np.minimum.accumulate(costs[order])
    first = np.concatenate([[True], costs[order][1:] < cheapest[:-1]])
    kept = order[first]
    if len(kept) <= FRONTIER or room == np.inf:
        return kept
    cell = np.floor(bits[kept] / (room / FRONTIER)).astype(np.int64)
    last = np.concatenate([cell[1:] != cell[:-1], [True]])  # the cheapest of a cell is its last
    return kept[last]
