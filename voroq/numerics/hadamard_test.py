"""Hadamard matrices are what they are called, and the fast product is the product with the explicit matrix."""

import pytest
import torch

from voroq.numerics.hadamard import hadamard, paley, random_signs, rotate, split, unrotate

CORES = [1, 2, 12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 148, 344]  # 52, 100: squares; 344: a cube
DIMENSIONS = [1, 2, 6, 7, 9, 12, 24, 40, 64, 96, 144, 384, 22, 52 * 8]


def sylvester(k: int) -> torch.Tensor:
    """Doubling, k times."""
    return torch.eye(1, dtype=torch.float64) if k == 0 else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), sylvester(k - 1))


@pytest.mark.parametrize("order", CORES)
def test_cores_are_hadamard_matrices(order):
    h = paley(order)
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


def test_orders_without_a_construction_are_refused():
    for order in (3, 6, 22, 92, 116, 172):
        with pytest.raises(ValueError, match="no Hadamard matrix of order"):
            paley(order)


@pytest.mark.parametrize("n", DIMENSIONS)
def test_the_fast_product_is_the_product_with_the_explicit_matrix(n):
    block, core = split(n)
    one = torch.kron(sylvester((block // core).bit_length() - 1), paley(core)) / block**0.5
    explicit = torch.block_diag(*[one] * (n // block))
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ explicit)
    torch.testing.assert_close(hadamard(x, transposed=True), x @ explicit.T)


@pytest.mark.parametrize("n", DIMENSIONS)
def test_rotations_are_orthogonal_and_unrotate_is_the_transpose(n):
    signs = random_signs(n, torch.Generator().manual_seed(1))
    eye = torch.eye(n, dtype=torch.float64)
    q = rotate(eye, signs)
    torch.testing.assert_close(q @ q.T, eye)
    torch.testing.assert_close(unrotate(eye, signs), q.T)
    assert torch.equal(signs.abs(), torch.ones(n, dtype=torch.float64))


def test_dimensions_of_known_models_need_no_blocks():
    known = {384: 12, 896: 28, 2560: 20, 3584: 28, 4096: 1, 8960: 140, 11008: 344, 13824: 108, 18944: 148, 29568: 924}
    assert {n: split(n) for n in known} == {n: (n, core) for n, core in known.items()}


def test_other_dimensions_are_rotated_in_the_largest_blocks():
    assert split(9) == (1, 1) and split(22) == (2, 1) and split(40 * 7) == (280, 140) and split(13 * 32) == (416, 52)
    with pytest.raises(ValueError, match="dimension 0"):
        split(0)


def test_signs_come_from_the_generator_and_one_spike_is_spread_evenly():
    first, second = (random_signs(96, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(first, random_signs(96, torch.Generator().manual_seed(0))) and not torch.equal(first, second)
    spike = torch.zeros(96)
    spike[7] = 1
    torch.testing.assert_close(rotate(spike, first).abs(), torch.full((96,), 96**-0.5))
