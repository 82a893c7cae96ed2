"""Pyramids held to exact counts, golden numbers, exhaustive bijections and brute force."""

import itertools
from math import comb

import pytest
import torch

from voroq.numerics.pyramid import count, counts, index_of, nearest_direction, project, vector_of

GOLDEN_COUNTS = {
    4: {1: 8, 2: 32, 6: 608, 12: 4672, 32: 87552},
    8: {1: 16, 5: 9424, 6: 27008, 13: 3732560, 29: 905546576},
    16: {2: 512, 11: 1219605600, 24: 39773478832128, 51: 2288216263858265952},
    32: {32: 186268135991213676920832, 96: 19173982658593330635707838510989606912},
    64: {42: 82557449750266417829442260663977943040},
    128: {32: 511023518355896681089372523392040556822528},
}


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def points(dim: int, pulses: int) -> torch.Tensor:
    """All of P(dim, pulses), by going through the cube around it."""
    side = range(-pulses, pulses + 1)
    return torch.tensor([y for y in itertools.product(side, repeat=dim) if sum(map(abs, y)) == pulses])


@pytest.mark.parametrize("dim", GOLDEN_COUNTS)
def test_counts_are_the_published_ones(dim: int):
    for pulses, expected in GOLDEN_COUNTS[dim].items():
        assert count(dim, pulses) == expected


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16, 40])
def test_counts_equal_the_closed_form(dim: int):
    """sum over the number z of non-zero entries: which, how the pulses are dealt to them, their signs."""
    row = counts(dim, 60)[dim]
    for k in range(1, 61):
        assert row[k] == sum(comb(dim, z) * comb(k - 1, z - 1) << z for z in range(1, dim + 1))


@pytest.mark.parametrize(
    ("y", "index"),
    [
        ((3, -1, 0, 2), 464),
        ((0, -2, 1, 0, 3, 0, -1, 1), 46744),
        ((1, 0, -1, 2, 0, 0, 3, -1, 0, 0, 1, 0, -2, 0, 0, 1), 2990679992),
    ],
)
def test_golden_indices(y: tuple[int, ...], index: int):
    assert int(index_of(torch.tensor([y]))) == index
    assert vector_of(torch.tensor([index]), torch.tensor([sum(map(abs, y))]), len(y)).tolist() == [list(y)]


def test_the_whole_order_of_a_small_pyramid():
    expected = [
        (0, 0, 2), (0, 0, -2), (0, 1, 1), (0, 1, -1), (0, -1, 1), (0, -1, -1), (0, 2, 0), (0, -2, 0), (1, 0, 1), (1, 0, -1), (1, 1, 0),
        (1, -1, 0), (-1, 0, 1), (-1, 0, -1), (-1, 1, 0), (-1, -1, 0), (2, 0, 0), (-2, 0, 0),
    ]  # fmt: skip
    assert vector_of(torch.arange(18), torch.full((18,), 2), 3).tolist() == [list(y) for y in expected]


def literal(y: tuple[int, ...]) -> int:
    """The docstring of the module, one vector at a time."""
    if len(y) == 1:
        return int(y[0] < 0)
    half, k = len(y) // 2, sum(map(abs, y))
    k_left = sum(map(abs, y[:half]))
    below = sum(count(half, j) * count(len(y) - half, k - j) for j in range(k_left))
    return below + literal(y[:half]) * count(len(y) - half, k - k_left) + literal(y[half:])


@pytest.mark.parametrize(("dim", "pulses"), [(1, 5), (2, 9), (3, 4), (4, 6), (5, 4), (6, 4), (8, 3)])
def test_numbers_are_a_bijection(dim: int, pulses: int):
    total = count(dim, pulses)
    y = vector_of(torch.arange(total), torch.full((total,), pulses), dim)
    assert {tuple(v) for v in y.tolist()} == {tuple(v) for v in points(dim, pulses).tolist()}
    assert torch.equal(index_of(y), torch.arange(total))
    assert index_of(y[:50]).tolist() == [literal(tuple(v)) for v in y[:50].tolist()]


@pytest.mark.parametrize(("dim", "most"), [(8, 29), (16, 51), (7, 40), (20, 30), (32, 20)])
def test_random_numbers_of_big_pyramids_come_back(dim: int, most: int):
    pulses = torch.randint(0, most + 1, (500,), generator=rng())
    totals = [count(dim, int(k)) for k in pulses]
    index = torch.tensor([int(u * (n - 1)) for u, n in zip(torch.rand(500, generator=rng(1)).tolist(), totals, strict=True)])
    index[:100] = torch.tensor([n - 1 for n in totals[:100]])
    y = vector_of(index, pulses, dim)
    assert torch.equal(y.abs().sum(1), pulses)
    assert torch.equal(index_of(y), index)
    assert index.tolist()[:40] == [literal(tuple(v)) for v in y[:40].tolist()]


@pytest.mark.parametrize(("dim", "pulses"), [(1, 3), (2, 7), (3, 5), (4, 6), (5, 3)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_projection_is_the_nearest_point(dim: int, pulses: int, spread: float):
    x = spread * torch.randn(300, dim, generator=rng(), dtype=torch.float64)
    y = project(x, torch.full((300,), pulses))
    assert torch.equal(y.abs().sum(1), torch.full((300,), float(pulses), dtype=torch.float64))
    best = torch.cdist(x, points(dim, pulses).double()).amin(1)
    torch.testing.assert_close((x - y).norm(dim=1), best, atol=1e-12, rtol=0)


def test_projection_of_zeros_ties_and_extremes_still_has_every_pulse():
    x = torch.stack([torch.zeros(16), torch.full((16,), 0.5), torch.full((16,), 1e6), torch.eye(16)[3] * 1e-30, -torch.ones(16)])
    for pulses in (1, 5, 40):
        y = project(x, torch.full((5,), pulses))
        assert torch.equal(y.abs().sum(1), torch.full((5,), float(pulses))) and torch.equal(y, y.round())


@pytest.mark.parametrize("size", [1e3, 1e9, 1e20])
def test_projection_of_lone_giants_takes_no_longer(size: float):
    x = torch.eye(16) * size + torch.rand(16, 16, generator=rng()) * size / 1e4
    assert torch.equal(project(x, torch.full((16,), 40)), 40 * torch.eye(16))
    x = torch.cat([x, torch.full((1, 16), torch.nan)])  # comes back, whatever it means
    assert project(x, torch.full((17,), 40)).shape == (17, 16)


def test_projection_follows_signs_and_order():
    x, pulses = torch.randn(200, 8, generator=rng(2)), torch.randint(1, 30, (200,), generator=rng(3))
    order, signs = torch.randperm(8, generator=rng(4)), torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1])
    y = project(3 * x, pulses)
    assert torch.equal(project(3 * x[:, order], pulses), y[:, order])
    assert torch.equal(project(3 * x * signs, pulses), y * signs)
    assert (y * x >= 0).all()


@pytest.mark.parametrize(("dim", "pulses"), [(3, 4), (4, 5), (5, 4), (4, 8)])
def test_direction_has_the_smallest_angle(dim: int, pulses: int):
    x = torch.randn(400, dim, generator=rng(5), dtype=torch.float64)
    words = torch.nn.functional.normalize(points(dim, pulses).double())
    y = nearest_direction(x, pulses)
    missed = (x @ words.T).amax(1) - (x * torch.nn.functional.normalize(y)).sum(1)
    assert missed.max() < 0.05 and (missed > 1e-9).double().mean() < 0.03
