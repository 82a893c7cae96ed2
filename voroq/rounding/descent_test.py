"""Coordinate descent held to its law (the loss never rises) and to a literal twin."""

import itertools

import pytest
import torch

from voroq.codebook.grid import Grid
from voroq.codebook.pyramid import Pulses
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.numerics.linalg import proxy_loss
from voroq.quantized import Band, Tile
from voroq.rounding.descent import descend
from voroq.rounding.feedback import Rounded, feedback

OUT, IN = 12, 24


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    mix = torch.randn(IN, IN, generator=rng(), dtype=torch.float64)
    x = torch.randn(200, IN, generator=rng(1), dtype=torch.float64) @ mix
    return torch.randn(OUT, IN, generator=rng(2), dtype=torch.float64), x.T @ x / 200 + 0.01 * torch.eye(IN)


def table(k: int, dim: int, scale: float = 1.0) -> Table:
    return Table(scale * torch.randn(k, dim, generator=rng(3), dtype=torch.float64))


def pulses(dim: int) -> Pulses:
    return Pulses(dim, (1, 3, 4), torch.tensor([0.6, 0.5, 0.8], dtype=torch.float64))


def grid() -> Band:
    return Band(0, IN, Tile(1, 1), Grid(2), torch.linspace(0.5, 0.9, OUT, dtype=torch.float64), torch.ones(OUT, dtype=torch.float64))


BANDS = {
    "1x1 grid": lambda: [grid()],
    "4x1 table": lambda: [Band(0, IN, Tile(4, 1), table(16, 4))],
    "5x1 table, padded": lambda: [Band(0, IN, Tile(5, 1), table(16, 5))],
    "residual": lambda: [Band(0, IN, Tile(2, 1), Residual((table(8, 2), table(4, 2, 0.5))))],
    "1x4 table": lambda: [Band(0, IN, Tile(1, 4), table(64, 4))],
    "2x3 table, then 1x4": lambda: [Band(0, 12, Tile(2, 3), table(64, 6)), Band(12, IN, Tile(1, 4), table(16, 4))],
    "pyramids with scales": lambda: [Band(0, IN, Tile(4, 1), pulses(4), torch.linspace(0.5, 0.9, 3, dtype=torch.float64))],
    "wide pyramids": lambda: [Band(0, IN, Tile(1, 4), pulses(4), torch.linspace(0.5, 0.9, OUT, dtype=torch.float64))],
    "outliers first": lambda: [Band(0, 5, Tile(2, 1), table(64, 2)), Band(5, IN, Tile(3, 1), table(16, 3))],
}

EXACT = ["1x1 grid", "4x1 table", "1x4 table", "2x3 table, then 1x4", "outliers first"]
"""Bands whose encoder finds the best word (a padded tile's also looks at the rows that are not there)."""


@pytest.fixture(params=BANDS, name="bands")
def _bands(request) -> list[Band]:
    return BANDS[request.param]()


def start(bands: list[Band], by_feedback: bool = False) -> tuple[torch.Tensor, ...]:
    """Codes of the feedback loop, or any codes at all."""
    if by_feedback:
        return feedback(*problem(), bands).codes
    return tuple(
        band.encode(torch.randn(OUT, band.stop - band.start, generator=rng(9), dtype=torch.float64)) for band in bands
    )


def decoded(bands, codes) -> torch.Tensor:
    return torch.cat([band.decode(part, OUT) for band, part in zip(bands, codes, strict=True)], dim=1)


def words(band: Band) -> torch.Tensor:
    """Every choice of codes for one tile."""
    return torch.cartesian_prod(*[torch.arange(2**width) for width in band.codebook.widths]).reshape(-1, len(band.codebook.widths))


@pytest.mark.parametrize("by_feedback", [False, True])
def test_no_sweep_raises_the_loss(bands: list[Band], by_feedback: bool):
    w, h = problem()
    codes = start(bands, by_feedback)
    losses = [proxy_loss(w - decoded(bands, codes), h).sum()]
    for _ in range(6):
        done = descend(w, h, bands, codes, sweeps=1)
        torch.testing.assert_close(done.loss, proxy_loss(w - decoded(bands, done.codes), h))
        codes = done.codes
        losses.append(done.loss.sum())
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses)) and losses[1] < losses[0]


def literal(w: torch.Tensor, h: torch.Tensor, bands: list[Band], codes, sweeps: int) -> list[torch.Tensor]:
    """Column by column, tile by tile: the word with the least loss of the whole matrix, all other tiles as they are now."""
    codes = [part.clone() for part in codes]
    for _ in range(sweeps):
        for band, part in zip(bands, codes, strict=True):
            for column in range(part.shape[1]):
                for row in range(part.shape[0]):
                    best, least = part[row, column].clone(), proxy_loss(w - decoded(bands, codes), h).sum() - 1e-12
                    for word in words(band):
                        part[row, column] = word
                        loss = proxy_loss(w - decoded(bands, codes), h).sum()
                        if loss < least:
                            best, least = word, loss
                    part[row, column] = best
    return codes


@pytest.mark.parametrize("name", EXACT)
def test_sweeps_equal_the_literal_search_over_all_words(name: str):
    w, h = problem()
    bands = BANDS[name]()
    done = descend(w, h, bands, start(bands), sweeps=1)
    assert all(torch.equal(a, b) for a, b in zip(done.codes, literal(w, h, bands, start(bands), 1), strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_a_fixed_point_cannot_be_improved_by_any_single_code(name: str):
    w, h = problem()
    bands = BANDS[name]()
    done = descend(w, h, bands, start(bands), sweeps=100)
    again = descend(w, h, bands, done.codes, sweeps=1)
    assert all(torch.equal(a, b) for a, b in zip(done.codes, again.codes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(done.codes, literal(w, h, bands, done.codes, 1), strict=True))


def test_a_full_beam_makes_the_sweep_exact_for_residual_tables():
    w, h = problem()
    main, rest = BANDS["residual"]()[0].codebook.stages
    bands = [Band(0, IN, Tile(2, 1), Residual((main, rest), beam=8))]
    done = descend(w, h, bands, start(bands), sweeps=1)
    assert torch.allclose(decoded(bands, done.codes), decoded(bands, literal(w, h, bands, start(bands), 1)))


def test_lazy_updates_change_nothing_but_time(bands: list[Band]):
    w, h = problem()
    one, other = (descend(w, h, bands, start(bands), sweeps=3, lazy=lazy) for lazy in (1, 7))
    assert all(torch.equal(a, b) for a, b in zip(one.codes, other.codes, strict=True))
    torch.testing.assert_close(one.targets, other.targets)


def test_targets_are_the_optima_of_the_columns():
    w, h = problem()
    bands = BANDS["4x1 table"]()
    done: Rounded = descend(w, h, bands, start(bands), sweeps=100)
    made = decoded(bands, done.codes)
    torch.testing.assert_close(done.targets, made + (w - made) @ h / h.diagonal())


def test_no_sweep_changes_nothing_and_the_codes_given_are_left_alone(bands: list[Band]):
    w, h = problem()
    codes = start(bands)
    kept = [part.clone() for part in codes]
    same, other = descend(w, h, bands, codes, sweeps=0), descend(w, h, bands, codes, sweeps=1)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(codes, kept, same.codes, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(codes, other.codes, strict=True))
