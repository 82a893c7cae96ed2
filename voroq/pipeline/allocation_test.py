import itertools

import pytest
import torch

from voroq.methods import RTN
from voroq.pipeline import allocation
from voroq.pipeline.allocation import Choice, spend


def menus(seed: int, sites: int = 5, settings: int = 6) -> list[list[Choice]]:
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(sites):
        weights, slope = int(torch.randint(50, 200, (1,), generator=rng)), float(torch.rand(1, generator=rng).exp())
        rates = (torch.rand(settings, generator=rng) * 4 + 1).tolist()
        noise = (1 + 0.3 * torch.rand(settings, generator=rng)).tolist()
        found.append([Choice((RTN(),), int(r * weights), slope * weights * n / 4**r) for r, n in zip(rates, noise, strict=True)])
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tight", [0.1, 0.5, 0.9, 2.0])
def test_the_allocation_is_that_of_exhaustive_search_on_five_sites(seed: int, tight: float):
    sites = menus(seed)
    low, high = (sum(pick(choice.bits for choice in menu) for menu in sites) for pick in (min, max))
    budget = low + tight * (high - low)
    every = [combo for combo in itertools.product(*sites) if sum(choice.bits for choice in combo) <= budget]
    best = min(sum(choice.cost for choice in combo) for combo in every)
    found = spend(sites, budget)
    assert sum(choice.bits for choice in found) <= budget
    assert sum(choice.cost for choice in found) == pytest.approx(best, rel=1e-12)
    assert all(choice in menu for choice, menu in zip(found, sites, strict=True))


def test_a_thinned_frontier_is_nearly_as_good(monkeypatch: pytest.MonkeyPatch):
    sites = menus(3, sites=40)
    budget = 1.3 * sum(min(choice.bits for choice in menu) for menu in sites)
    exact = sum(choice.cost for choice in spend(sites, budget))
    monkeypatch.setattr(allocation, "FRONTIER", 200)
    thinned = spend(sites, budget)
    assert sum(choice.bits for choice in thinned) <= budget
    assert exact <= sum(choice.cost for choice in thinned) <= 1.02 * exact


def test_nothing_fits_below_the_cheapest():
    sites = menus(1)
    low = sum(min(choice.bits for choice in menu) for menu in sites)
    assert spend(sites, low - 1) is None
    assert sum(choice.bits for choice in spend(sites, low)) == low
