"""The laws of `base.Codebook`, for every codebook."""

import pytest
import torch

from voroq.codebook.base import Codebook
from voroq.codebook.gain_shape import GainShape
from voroq.codebook.grid import Grid
from voroq.codebook.pyramid import Pulses, Pyramids
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def words(book: Codebook) -> torch.Tensor:
    """Every word of a small codebook, by counting through its codes."""
    codes = torch.cartesian_prod(*[torch.arange(2**width) for width in book.widths]).reshape(-1, len(book.widths))
    return book.decode(codes)


BOOKS = {
    "table": Table(torch.randn(32, 4, generator=rng())),
    "residual": Residual((Table(torch.randn(16, 3, generator=rng(1))), Table(0.3 * torch.randn(8, 3, generator=rng(2))))),
    "grid": Grid(3),
    "pulses": Pulses(3, (2, 1), torch.tensor([0.9, 1.6])),
    "pyramids": Pyramids(3, (2, 4, 3), torch.tensor([0.7, 0.55, 1.1])),
    "pyramids, two streams": Pyramids(16, (8, 8, 10), torch.tensor([0.68, 0.93, 0.8]), bits=37),
    "pyramids, all 64 bits": Pyramids(16, (52, 51, 51, 51, 51, 51), torch.linspace(0.18, 0.4, 6)),
    "gain, shape": GainShape(4, 8, torch.tensor([1.0, 2.5])),
}
UNCOUNTED = ["pulses", "pyramids, two streams", "pyramids, all 64 bits", "gain, shape"]
"""Codebooks whose words cannot be had by counting through their codes, and one that only very seldom misses the nearest."""


@pytest.fixture(params=BOOKS, name="book")
def _book(request) -> Codebook:
    return BOOKS[request.param]


def points(book: Codebook) -> torch.Tensor:
    return 2 * torch.randn(200, book.dim, generator=rng(3)) + (2.0 if isinstance(book, Grid) else 0.0)


def test_codes_fit_their_widths(book: Codebook):
    codes = book.encode(points(book))
    assert codes.shape == (200, len(book.widths))
    for s, width in enumerate(book.widths):
        assert codes[:, s].min() >= 0 and codes[:, s].max() < 2**width


@pytest.mark.parametrize("name", [name for name in BOOKS if name not in UNCOUNTED])
def test_exact_means_nearest_and_stable(name: str):
    book = BOOKS[name]
    v = points(book)
    found = (v - book.decode(book.encode(v))).square().sum(1)
    best = torch.cdist(v.double(), words(book).double()).square().min(1).values.float()
    if book.exact:
        torch.testing.assert_close(found, best, atol=1e-4, rtol=1e-4)
        assert torch.equal(book.decode(book.encode(words(book))), words(book))
    else:
        assert (found > best + 1e-3).any(), "a codebook that always finds the nearest word should say so"


def test_greedy_stages_are_nearest_given_the_ones_before():
    book = BOOKS["residual"]
    left, codes = points(book), book.encode(points(book))
    for s, stage in enumerate(book.stages):
        assert torch.equal(codes[:, s], torch.cdist(left.double(), stage.centroids.double()).argmin(1))
        left = left - stage.centroids[codes[:, s]]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("metric", [False, True])
def test_full_beam_is_exhaustive_search(stages: int, metric: bool):
    tables = tuple(Table(torch.randn(k, 3, generator=rng(5 + k), dtype=torch.float64)) for k in (8, 4, 2)[:stages])
    book, v = Residual(tables, beam=32), torch.randn(100, 3, generator=rng(6), dtype=torch.float64)
    root = torch.randn(3, 3, generator=rng(7), dtype=torch.float64)
    weight = root @ root.T + 0.1 * torch.eye(3) if metric else torch.eye(3, dtype=torch.float64)
    delta = v[:, None] - words(book)
    best = torch.einsum("nkd,de,nke->nk", delta, weight, delta).argmin(1)
    codes = torch.cartesian_prod(*[torch.arange(2**width) for width in book.widths])
    assert torch.equal(book.encode(v, weight if metric else None), codes[best])


def test_beam_carries_the_nearest_partial_sums():
    """The literal search, vector by vector: extend every sum by every word of the next table, sort, keep the best three."""
    tables = [torch.randn(k, 3, generator=rng(5 + k)) for k in (16, 8, 8)]
    v, expected = torch.randn(60, 3, generator=rng(6)), []
    for one in v:
        sums = [(one, ())]
        for table in tables:
            longer = [(left - word, (*codes, j)) for left, codes in sums for j, word in enumerate(table)]
            sums = sorted(longer, key=lambda pair: float(pair[0].square().sum()))[:3]
        expected.append(list(sums[0][1]))
    assert Residual(tuple(map(Table, tables)), beam=3).encode(v).tolist() == expected


def test_beams_split_into_chunks_find_the_same(monkeypatch: pytest.MonkeyPatch):
    book, v = Residual(BOOKS["residual"].stages, beam=4), points(BOOKS["residual"])
    whole = book.encode(v)
    monkeypatch.setattr("voroq.codebook.residual.CHUNK", 28)
    monkeypatch.setattr("voroq.numerics.nearest.CHUNK", 100)
    assert torch.equal(book.encode(v), whole)


def test_wider_beams_come_nearer_and_tables_put_back_keep_theirs():
    v = points(BOOKS["residual"])
    errors = [(v - book.decode(book.encode(v))).square().sum() for book in (Residual(BOOKS["residual"].stages, b) for b in (1, 2, 4, 16))]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) >= 3
    wide = Residual(BOOKS["residual"].stages, beam=16)
    assert wide.with_tensors(wide.tensors()).beam == 16


def test_metric_changes_the_choice_as_brute_force_says():
    book, v = BOOKS["table"], points(BOOKS["table"])
    root = torch.randn(4, 4, generator=rng(4))
    metric = root @ root.T + 0.1 * torch.eye(4)
    delta = v[:, None] - book.centroids
    assert torch.equal(book.encode(v, metric)[:, 0], torch.einsum("nkd,de,nke->nk", delta, metric, delta).argmin(1))


def test_tensors_go_out_and_in_again(book: Codebook):
    doubled = book.with_tensors({name: 2 * t for name, t in book.tensors().items()})
    codes = book.encode(points(book))
    if book.tensors():
        torch.testing.assert_close(doubled.decode(codes), 2 * book.decode(codes))
    assert doubled.widths == book.widths and isinstance(book, Codebook)


def test_tables_need_a_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        Table(torch.zeros(3, 2))
