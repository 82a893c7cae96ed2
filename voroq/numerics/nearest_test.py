"""The search, against a literal one; and the library's search against the same scores summed one by one."""

import pytest
import torch

from voroq import native
from voroq.numerics import nearest as module
from voroq.numerics.nearest import nearest

needs_library = pytest.mark.skipif(native.library() is None, reason=f"{native.problem()}")
SIZES = [(1, 2), (2, 64), (3, 17), (4, 256), (5, 2047), (6, 2048), (8, 4096), (8, 2500), (12, 2048), (16, 4096), (24, 2100)]
"""Below, at and above the size from which tables are sorted; full and ragged leaves."""


def points(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["torch", "library"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "is_native", lambda v: False)
    elif native.library() is None:
        pytest.skip(native.problem())


@pytest.mark.parametrize(("dim", "k"), SIZES)
def test_nearest_is_nearest(way, dim, k):
    v, table = points(301, dim, 1), points(k, dim, 2)
    squared = (v.double()[:, None] - table.double()).square().sum(2)
    found = nearest(v, table)
    assert (squared.gather(1, found[:, None])[:, 0] <= squared.amin(1) * (1 + 1e-5)).all()


def test_of_equally_near_ones_the_first(way):
    for k in (64, 4096):
        table = points(k // 2, 4, 3).repeat(2, 1)
        assert torch.equal(nearest(table, table), torch.arange(k // 2).repeat(2))


def test_a_metric_is_that_of_the_distance(way):
    v, table = points(50, 4, 1), points(64, 4, 2)
    a = points(4, 4, 3)
    metric = a @ a.T + torch.eye(4)
    e = v[:, None] - table
    assert torch.equal(nearest(v, table, metric), torch.einsum("nki,ij,nkj->nk", e, metric, e).argmin(1))


@needs_library
@pytest.mark.parametrize("isa", range(len(native.isas())), ids=native.isas())
@pytest.mark.parametrize(("dim", "k"), SIZES)
def test_sorting_the_table_changes_nothing(isa, dim, k):
    """Every score summed in the library's own order, in float64 rounded at each step: exact products, one rounding a step, as fused."""
    v, table = points(200, dim, 4), points(k, dim, 5)
    v[:50] = table[torch.arange(50) % k] * (1 + 1e-4 * v[:50])  # some very near
    norms = torch.zeros(k)
    for d in range(dim):
        norms = norms + table[:, d] * table[:, d]
    score = (-0.5 * norms).expand(200, k)
    for d in range(dim):
        score = (v[:, d, None].double() * table[:, d].double() + score.double()).float()
    if native.isas()[isa] == "portable":  # does not fuse: equal but for near ties
        found = native.Index(table).nearest(v, isa)
        assert (score.gather(1, found[:, None])[:, 0] >= score.amax(1) - 1e-4).all()
    else:
        assert torch.equal(native.Index(table).nearest(v, isa), score.argmax(1))


@needs_library
def test_threads_change_nothing_and_odd_numbers_of_points_are_searched():
    table, before = points(4096, 8, 6), torch.get_num_threads()
    try:
        for n in (0, 1, 3, 65, 1000):
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(nearest(points(n, 8, n), table))
            assert all(torch.equal(f, found[0]) for f in found)
            assert len(found[0]) == n
    finally:
        torch.set_num_threads(before)


@needs_library
def test_what_is_not_a_number_gets_some_centroid():
    for k in (64, 4096):
        found = nearest(torch.full((3, 4), torch.nan), points(k, 4, 1))
        assert ((found >= 0) & (found < k)).all()


@needs_library
def test_a_table_that_was_written_to_is_sorted_again():
    table = points(4096, 4, 1)
    first = nearest(points(100, 4, 2), table)
    table.copy_(table.flip(0).clone())
    assert torch.equal(nearest(points(100, 4, 2), table), 4095 - first)


@needs_library
def test_indices_of_forgotten_tables_are_not_mistaken_for_others():
    for seed in range(30):
        table = points(2048, 8, seed)
        assert torch.equal(nearest(table, table), torch.arange(2048))
    assert len(native._KEPT) <= native._MOST
