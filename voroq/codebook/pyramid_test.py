"""Unions of pyramids held to their bijection, to brute force, and to the mean squared errors they are chosen for."""

import itertools

import pytest
import torch

from voroq import native
from voroq.codebook.gain_shape import GainShape, gain_shape
from voroq.codebook.presets import dims, distortion, preset, widths
from voroq.codebook.pyramid import Pulses, Pyramids, move_pulses
from voroq.numerics.gains import best_gains
from voroq.numerics.pyramid import count, nearest_direction, vector_of


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def streams(book: Pyramids, numbers: list[int]) -> torch.Tensor:
    return torch.tensor([[n >> 32 * s & 2**32 - 1 for s in range(len(book.widths))] for n in numbers])


def points(dim: int, pulses: int) -> torch.Tensor:
    total = count(dim, pulses)
    return vector_of(torch.arange(total), torch.full((total,), pulses), dim)


PRESETS = [(dim, width) for dim in dims() for width in widths(dim)]


@pytest.mark.parametrize(("dim", "width"), PRESETS)
def test_numbers_at_the_edges_of_every_level_come_back(dim: int, width: int):
    book = preset(dim, width)
    ends = list(itertools.accumulate(count(dim, k) for k in book.pulses))
    numbers = sorted({n for end in [0, *ends] for n in (end - 1, end, end + 1) if 0 <= n < ends[-1]})
    numbers += [int(u * ends[-1]) for u in torch.rand(50, generator=rng(), dtype=torch.float64).tolist()]
    codes = streams(book, numbers)
    spelled = book.spell(codes)
    assert torch.equal(book.number(spelled), codes)
    assert spelled[:, 0].tolist() == [next(j for j, end in enumerate(ends) if n < end) for n in numbers]
    rest = book.decode(streams(book, [ends[-1], ends[-1] + 1, 2**width - 1]))
    assert torch.equal(rest, torch.zeros(3, dim)), "numbers left over name the zero vector"


@pytest.mark.parametrize("width", [10, 16, 24, 33, 48])
def test_the_class_order_numbers_the_same_words(width: int):
    split = preset(8, width)
    classes = Pyramids(8, split.pulses, split.scales, width, "class-v1")
    spelled = split.spelled.encode(torch.randn(3000, 8, generator=rng()))
    codes = classes.number(spelled)
    assert torch.equal(classes.spell(codes), spelled) and not torch.equal(codes, split.number(spelled))
    assert torch.equal(classes.decode(streams(classes, [2**width - 1])), torch.zeros(1, 8)), "numbers left over name the zero vector"


def test_an_order_that_vectors_do_not_have_is_refused():
    for dim, order in ((16, "class-v1"), (8, "cwrs")):
        with pytest.raises(ValueError, match=f"vectors of {dim} weights have no order '{order}'"):
            Pyramids(dim, (3,), torch.ones(1), 40, order)


@pytest.mark.parametrize("dim", dims())
def test_presets_lose_what_the_file_says_and_less_with_every_bit(dim: int):
    assert [distortion(dim, w) for w in widths(dim)] == sorted((distortion(dim, w) for w in widths(dim)), reverse=True)
    v = torch.randn(2**19 // dim, dim, generator=rng(8))
    for width in (2 * dim, 3 * dim, widths(dim)[-1]):
        book = preset(dim, width)
        assert book.bits == width
        torch.testing.assert_close(float((book.decode(book.encode(v)) - v).square().mean()), distortion(dim, width), rtol=0.01, atol=0)


BEST_KNOWN = {32: 0.0974, 40: 0.0487, 48: 0.0242, 52: 0.0176, 56: 0.0124, 64: 0.0062}
"""Mean squared errors for unit Gaussians in 16 dimensions, by bits per vector."""


@pytest.mark.parametrize("width", BEST_KNOWN)
def test_sixteen_dimensions_reach_the_best_known_errors(width: int):
    assert distortion(16, width) < 1.005 * BEST_KNOWN[width]


def test_zero_is_a_word_and_what_is_nearest_to_small_vectors():
    book = Pyramids(4, (3, 5), torch.tensor([1.0, 1.2]))
    v = torch.cat([torch.zeros(1, 4), 0.1 * torch.randn(20, 4, generator=rng())])
    assert torch.equal(book.decode(book.encode(v)), torch.zeros(21, 4))


@pytest.mark.parametrize("seed", range(4))
def test_search_in_a_metric_comes_near_the_best_word(seed: int):
    book = Pyramids(4, (2, 4, 3), torch.tensor([0.7, 0.5, 1.0]))
    v, root = torch.randn(200, 4, generator=rng(seed)), torch.randn(4, 4, generator=rng(seed + 9))
    metric = root @ root.T + 0.05 * torch.eye(4)
    words = torch.cat([torch.zeros(1, 4), *[s * points(4, k) for s, k in zip(book.scales, book.pulses, strict=True)]])

    def cost(delta: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...d,de,...e->...", delta, metric, delta)

    found, plain = (cost(v - book.decode(book.encode(v, m))) for m in (metric, None))
    best = cost(v[:, None] - words).amin(1)
    assert (found <= plain * (1 + 1e-5)).all() and (found >= best * (1 - 1e-5)).all()
    assert found.sum() < 1.05 * best.sum() < plain.sum()


def test_moves_keep_every_pulse_and_end_where_no_single_move_helps():
    x, root = 3 * torch.randn(100, 5, generator=rng(), dtype=torch.float64), torch.randn(5, 5, generator=rng(1), dtype=torch.float64)
    metric = root @ root.T + 0.1 * torch.eye(5)
    y = move_pulses(x, vector_of(torch.randint(0, count(5, 7), (100,), generator=rng(2)), torch.full((100,), 7), 5).double(), metric)
    assert torch.equal(y.abs().sum(1), torch.full((100,), 7.0, dtype=torch.float64))

    def cost(y: torch.Tensor) -> float:
        return float((x[row] - y) @ metric @ (x[row] - y))

    for row in range(100):
        here = cost(y[row])
        for i, k, sign in itertools.product(range(5), range(5), (-1, 1)):
            other = y[row].clone()
            other[i] -= other[i].sign()
            other[k] += sign
            if y[row, i] != 0 and other.abs().sum() == 7:
                assert cost(other) > here - 1e-4


GOLDEN_GAINS = {
    (8, 2): (0.6422, 0.8828, 1.1065, 1.3847),
    (16, 1): (0.8534, 1.1344),
    (16, 3): (0.6455, 0.7721, 0.8688, 0.9558, 1.0418, 1.1339, 1.2425, 1.3960),
    (128, 2): (0.9064, 0.9713, 1.0278, 1.0950),
}


def test_gains_are_the_published_ones_of_long_rows():
    for (dim, bits), expected in GOLDEN_GAINS.items():
        found = torch.tensor(best_gains(dim, 1 << 30, bits)) / dim**0.5
        torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=0)
    found = torch.tensor(best_gains(16, 4096, 2)) / 4
    torch.testing.assert_close(found, torch.tensor((0.74148, 0.91715, 1.07596, 1.26991)), atol=5e-5, rtol=0)


def test_gains_are_where_real_blocks_of_real_rows_are():
    """Each level is the mean of the sampled gains nearest to it, short rows included."""
    rows = torch.randn(4000, 64, generator=rng(), dtype=torch.float64)
    blocks = torch.nn.functional.normalize(rows).reshape(4000, 4, 16).norm(dim=2).flatten() * 8
    levels = torch.tensor(best_gains(16, 64, 2), dtype=torch.float64)
    cell = (blocks[:, None] - levels).abs().argmin(1)
    torch.testing.assert_close(torch.stack([blocks[cell == j].mean() for j in range(4)]), levels, rtol=4e-3, atol=0)


@pytest.mark.parametrize(("dim", "bits", "known"), [(8, 2, 0.10625), (8, 3, 0.02805), (16, 2, 0.10483), (16, 3, 0.02664), (16, 4, 0.00643)])
def test_the_papers_form_has_its_known_error_and_the_union_a_lower_one(dim: int, bits: int, known: float):
    book, v = gain_shape(dim, dim * bits, 1 << 20), torch.randn(2**18 // dim, dim, generator=rng(3))
    error = float((v - book.decode(book.encode(v))).square().mean())
    torch.testing.assert_close(error, known, rtol=0.012, atol=0)
    assert distortion(dim, dim * bits) < error and sum(book.widths) <= dim * bits


def test_a_gain_and_a_direction_are_what_a_word_is():
    book = GainShape(4, 5, torch.tensor([0.5, 2.0]))
    v = torch.randn(50, 4, generator=rng())
    word = book.decode(book.encode(v))
    y = nearest_direction(v, 5)
    torch.testing.assert_close(torch.nn.functional.normalize(word), torch.nn.functional.normalize(y))
    assert {round(float(n), 4) for n in word.norm(dim=1)} <= {0.5, 2.0}


def test_what_cannot_be_numbered_is_refused():
    with pytest.raises(ValueError, match="do not fit into 16 bits"):
        Pyramids(8, (6, 6, 6), torch.ones(3), bits=16)
    with pytest.raises(ValueError, match="63 for one pyramid"):
        Pyramids(16, (64,), torch.ones(1))
    with pytest.raises(ValueError, match="exceeds 64 bits"):
        GainShape(16, 64, torch.ones(2))
    with pytest.raises(ValueError, match="at least one pulse"):
        Pyramids(8, (3, 4), torch.ones(1)).decode(torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.skipif(native.library() is None, reason=f"{native.problem()}")
@pytest.mark.parametrize("isa", range(len(native.isas())), ids=native.isas())
@pytest.mark.parametrize(("dim", "width"), [(8, 8), (8, 16), (8, 31), (8, 48), (16, 16), (16, 32), (16, 49), (16, 64)])
def test_the_library_finds_the_words_that_torch_finds(dim: int, width: int, isa: int, monkeypatch):
    book = preset(dim, width).spelled if width <= 46 or dim == 16 else Pulses(dim, (99, 127, 40), torch.tensor([0.05, 0.03, -0.2]))
    assert max(book.pulses) <= native.MOST_PULSES
    v = torch.randn(4096, dim, generator=rng(width))
    v[::7] *= torch.rand(586, 1, generator=rng()) * 20  # lone giants, and what is next to nothing
    v[::11, 1:] = 0
    v[::13] = v[::13].mul(4).round() / 4  # ties
    v[-1] = 0
    level, y = native.project(v, book.pulses, book.scales, isa)
    monkeypatch.setattr(native, "library", lambda: None)
    expected_level, expected_y = book._nearest(v)
    assert torch.equal(level, expected_level)
    assert torch.equal(y, expected_y)


@pytest.mark.skipif(native.library() is None, reason=f"{native.problem()}")
def test_the_library_is_asked_for_vectors_it_knows(monkeypatch):
    asked = []
    nothing = torch.zeros(1, dtype=torch.long)
    monkeypatch.setattr(native, "project", lambda v, pulses, scales: asked.append(v) or (nothing, torch.zeros_like(v)))
    for dim, dtype in ((16, torch.float32), (16, torch.float64), (4, torch.float32)):
        Pulses(dim, (3,), torch.ones(1)).encode(torch.ones(1, dim, dtype=dtype))
    assert [v.shape for v in asked] == [(1, 16)]
