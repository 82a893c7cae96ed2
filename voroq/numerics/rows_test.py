"""Rows by index are what indexing gives, and so is their gradient."""

import pytest
import torch

from voroq.numerics.rows import rows


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_rows_and_their_gradient_are_those_of_indexing(dtype):
    rng = torch.Generator().manual_seed(0)
    index, weights = torch.randint(0, 7, (500,), generator=rng).to(dtype), torch.randn(500, 3, generator=rng, dtype=torch.float64)
    table = torch.randn(8, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    found = rows(table, index)
    assert torch.equal(found, table[index.long()]) and torch.equal(rows(table.detach(), index), found.detach())
    (ours,) = torch.autograd.grad((found * weights).sum(), table)
    (theirs,) = torch.autograd.grad((table[index.long()] * weights).sum(), table)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not ours[7].any(), "no index points there"


def test_the_gradient_has_the_same_bits_whatever_the_threads():
    rng = torch.Generator().manual_seed(1)
    index, weights = torch.randint(0, 64, (200_000,), generator=rng), torch.randn(200_000, 2, generator=rng)
    table, before, made = torch.randn(64, 2, generator=rng, requires_grad=True), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(torch.autograd.grad((rows(table, index) * weights).sum(), table)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, made[0]) for one in made)


def test_an_index_outside_is_refused():
    for index in (8, -1):
        with pytest.raises((IndexError, RuntimeError)):
            rows(torch.zeros(8, 2), torch.tensor([index]))
