"""The class code against its golden numbers, exhaustively as a bijection, and against counting."""

import itertools

import pytest
import torch

from voroq.numerics.class_code import class_index_of, class_vector_of, ways
from voroq.numerics.pyramid import count, index_of, vector_of

P_3_2 = [
    (0, 0, 2), (0, 0, -2), (0, 2, 0), (0, -2, 0), (2, 0, 0), (-2, 0, 0), (0, 1, 1), (0, -1, 1), (0, 1, -1), (0, -1, -1), (1, 0, 1),
    (-1, 0, 1), (1, 0, -1), (-1, 0, -1), (1, 1, 0), (-1, 1, 0), (1, -1, 0), (-1, -1, 0),
]  # fmt: skip
GOLDEN = {(3, -1, 0, 2): 394, (0, -2, 1, 0, 3, 0, -1, 1): 68009}


def test_the_numbers_are_the_golden_ones():
    assert class_index_of(torch.tensor(P_3_2)).tolist() == list(range(18))
    assert [tuple(y) for y in class_vector_of(torch.arange(18), torch.full((18,), 2), 3).tolist()] == P_3_2
    for y, number in GOLDEN.items():
        assert class_index_of(torch.tensor([y])).tolist() == [number]


@pytest.mark.parametrize(("dim", "pulses"), [(1, 0), (1, 3), (2, 5), (4, 6), (6, 4), (8, 3), (8, 5), (8, 6), (7, 0), (3, 40)])
def test_it_is_a_bijection(dim: int, pulses: int):
    total = count(dim, pulses)
    everything = torch.arange(total)
    y = class_vector_of(everything, torch.full((total,), pulses), dim)
    assert torch.equal(y.abs().sum(1), torch.full((total,), pulses)) and torch.equal(class_index_of(y), everything)
    assert torch.equal(index_of(y).sort().values, everything)


def test_magnitudes_are_counted_and_ranked_in_lexicographic_order():
    for dim, pulses in ((4, 6), (5, 3), (3, 9)):
        found = {y for y in itertools.product(range(pulses + 1), repeat=dim) if sum(y) == pulses}
        for z in range(1, dim + 1):
            own = sorted(y for y in found if sum(v > 0 for v in y) == z)
            assert len(own) == ways(dim, pulses, z)
            if own:
                numbers = class_index_of(torch.tensor(own))
                assert torch.equal(numbers.diff(), torch.full((len(own) - 1,), 1 << z))


def test_many_pulses_of_different_pyramids_come_back():
    rng = torch.Generator().manual_seed(0)
    pulses = torch.randint(0, 50, (20000,), generator=rng)
    totals = torch.tensor([count(8, k) for k in pulses.tolist()])
    index = (torch.rand(20000, generator=rng, dtype=torch.float64) * totals).long()
    y = class_vector_of(index, pulses, 8)
    assert torch.equal(class_index_of(y), index) and torch.equal(class_index_of(vector_of(index_of(y), pulses, 8)), index)


def test_long_vectors_are_refused():
    with pytest.raises(ValueError, match="1 to 8 entries, got 16"):
        class_index_of(torch.zeros(1, 16, dtype=torch.long))
