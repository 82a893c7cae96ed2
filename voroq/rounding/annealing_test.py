"""Annealing finds what no single code's move can, and keeps its books while it is off the path."""

import itertools

import pytest
import torch

from voroq import native
from voroq.codebook.table import Table
from voroq.quantized import Band, Tile
from voroq.rounding import descent, kronecker
from voroq.rounding.metric import Guided, Metric


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def spd(size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    x = torch.randn(size, rank or size, generator=rng(seed), dtype=torch.float64)
    return x @ x.T / x.shape[1] + 0.05 * torch.eye(size, dtype=torch.float64)


def band(columns: int, rows: int, k: int = 4, dtype: torch.dtype = torch.float64, cols: int = 1, start: int = 0) -> Band:
    words = torch.randn(k, rows * cols, generator=rng(1), dtype=torch.float64).to(dtype)
    return Band(start, start + columns, Tile(rows, cols), Table(words))


def decoded(done, out: int) -> torch.Tensor:
    return torch.cat([one.decode(codes, out) for one, codes in zip(done.bands, done.codes, strict=True)], dim=1)


def nothing(bands: list[Band], out: int) -> list[torch.Tensor]:
    return [torch.zeros(-(-out // b.tile.rows), (b.stop - b.start) // b.tile.cols, 1, dtype=torch.long) for b in bands]


LOSSES = {"one side": Metric(spd(6, 2, 2)), "two sides": Metric(spd(6, 2, 2), spd(2, 3)), "groups": Guided(spd(6, 2, 2)[None], 2)}


@pytest.mark.parametrize("name", LOSSES)
def test_it_all_but_finds_the_best_of_all_codes_where_descent_is_stuck(name: str):
    loss, w, bands = LOSSES[name], 0.5 * torch.randn(2, 6, generator=rng(4), dtype=torch.float64), [band(6, 2)]
    every = torch.tensor(list(itertools.product(range(4), repeat=6)))
    errors = w - bands[0].codebook.centroids[every].transpose(1, 2)  # [4^6, 2, 6]
    least = float(min((loss.gradient(error) * error).sum() for error in errors))
    stuck = loss.descend(w, bands, nothing(bands, 2), sweeps=100)
    found = [loss.anneal(w, bands, stuck.codes, sweeps=500, rng=rng(seed)).loss.sum() for seed in range(4)]
    assert float(stuck.loss.sum()) > 2 * least
    assert least * (1 - 1e-9) <= float(min(found)) < 1.03 * least


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_loss_is_that_of_the_codes_and_how_many_rows_or_columns_at_a_time_changes_nothing(two_sided: bool):
    w, h, g = torch.randn(11, 20, generator=rng(6), dtype=torch.float64), spd(20, 7), spd(11, 8)
    bands = [band(8, 2), band(12, 4, start=8)]
    one, other = (
        kronecker.anneal(w, h, g, bands, nothing(bands, 11), sweeps=9, rng=rng(9), lazy=lazy)
        if two_sided
        else descent.anneal(w, h, bands, nothing(bands, 11), sweeps=9, rng=rng(9), lazy=lazy)
        for lazy in (1, 7)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.codes, other.codes, strict=True))
    delta = w - decoded(one, 11)
    torch.testing.assert_close(one.loss, (((g if two_sided else torch.eye(11, dtype=torch.float64)) @ delta @ h) * delta).sum(1))


def test_tiles_wider_than_a_column_are_annealed_too():
    w, h, bands = torch.randn(8, 12, generator=rng(6), dtype=torch.float64), spd(12, 7), [band(12, 1, k=16, cols=3)]
    stuck = descent.descend(w, h, bands, nothing(bands, 8), sweeps=100)
    found = descent.anneal(w, h, bands, stuck.codes, sweeps=300, rng=rng(1))
    assert float(found.loss.sum()) < 0.99 * float(stuck.loss.sum())
    torch.testing.assert_close(found.loss.sum(), ((w - decoded(found, 8)) @ h * (w - decoded(found, 8))).sum())


def test_the_same_generator_finds_the_same_codes_and_another_others():
    w, h, g, bands = torch.randn(12, 16, generator=rng(6), dtype=torch.float64), spd(16, 7), spd(12, 8), [band(16, 2)]
    a, b, c = (kronecker.anneal(w, h, g, bands, nothing(bands, 12), sweeps=5, rng=rng(seed)).codes[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_temperatures_fall_from_a_share_of_what_a_weight_costs_and_never_reach_nothing():
    heats = descent.cooling(2.0, 4)
    assert heats == pytest.approx([0.2, 0.15, 0.1, 0.05]) and descent.cooling(2.0, 0) == []


def test_targets_are_off_by_the_temperature_over_the_curvature():
    """Cov(noise at the pulls) = heat * metric of the tile * H_jj, which the target divides by both."""
    weights, h = spd(6, 3), torch.diag(torch.tensor([0.5, 4.0], dtype=torch.float64))
    strip = kronecker._Strip.of(band(2, 3), torch.zeros(2, 2, 1, dtype=torch.long), h, weights, 128)
    drawn = torch.stack([strip._shaken(0.3, rng(seed)) for seed in range(4000)])  # [n rows v c]
    for row, column in itertools.product(range(2), range(2)):
        metric = weights[3 * row : 3 * row + 3, 3 * row : 3 * row + 3]
        torch.testing.assert_close(torch.cov(drawn[:, row, :, column].T), 0.3 * metric * h[column, column], rtol=0.1, atol=0.1)


@pytest.mark.skipif(native.library() is None, reason="the library of kernels is not built")
def test_the_library_and_torch_anneal_alike(monkeypatch: pytest.MonkeyPatch):
    w, h, g = torch.randn(14, 20, generator=rng(6)), spd(20, 7).float(), spd(14, 8).float()
    bands = [band(20, 4, k=16, dtype=torch.float32)]
    fast = kronecker.anneal(w, h, g, bands, nothing(bands, 14), sweeps=6, rng=rng(9))
    monkeypatch.setattr(kronecker, "is_native", lambda v: False)
    slow = kronecker.anneal(w, h, g, bands, nothing(bands, 14), sweeps=6, rng=rng(9))
    assert torch.equal(fast.codes[0], slow.codes[0]) and not torch.equal(fast.codes[0], nothing(bands, 14)[0])
