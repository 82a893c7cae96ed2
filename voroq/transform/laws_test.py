"""The laws of `base.Transform`, for every transform."""

import pytest
import torch

from voroq.numerics.linalg import proxy_loss
from voroq.transform.affine import ColumnAffine
from voroq.transform.base import Transform
from voroq.transform.chain import Chain
from voroq.transform.hadamard import Hadamard
from voroq.transform.permute import Permute
from voroq.transform.rows import RowAffine

OUT, IN = 6, 12


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def affine() -> ColumnAffine:
    return ColumnAffine(torch.rand(IN, generator=rng(), dtype=torch.float64) + 0.5, torch.randn(IN, generator=rng(1), dtype=torch.float64))


def rows() -> RowAffine:
    return RowAffine(torch.rand(OUT, generator=rng(3), dtype=torch.float64) + 0.5, torch.randn(OUT, generator=rng(4), dtype=torch.float64))


TRANSFORMS = {
    "identity": lambda: Chain(),
    "affine": affine,
    "permute": lambda: Permute(torch.randperm(IN, generator=rng(2))),
    "affine, permute": lambda: Chain((affine(), Permute(torch.randperm(IN, generator=rng(2))))),
    "permute, affine": lambda: Chain((Permute(torch.randperm(IN, generator=rng(2))), affine())),
    "hadamard input": lambda: Hadamard.random((OUT, IN), rng(7)),
    "hadamard both": lambda: Hadamard.random((OUT, IN), rng(7), both=True),
    "hadamard both, affine": lambda: Chain((Hadamard.random((OUT, IN), rng(7), both=True), affine())),
}


ROWS = {"rows": rows, "rows, permute": lambda: Chain((rows(), Permute(torch.randperm(IN, generator=rng(2)))))}
"""These scale each row's loss by its own factor."""


@pytest.fixture(params=[*TRANSFORMS, *ROWS], name="t")
def _t(request) -> Transform:
    return (TRANSFORMS | ROWS)[request.param]()


def matrix(seed: int, rows: int = OUT) -> torch.Tensor:
    return torch.randn(rows, IN, generator=rng(seed), dtype=torch.float64)


def test_restore_undoes_weight(t: Transform):
    torch.testing.assert_close(t.restore(t.weight(matrix(3))), matrix(3))


def test_linear_with_the_transformed_weight_is_the_linear(t: Transform):
    x, w = matrix(4, rows=5).reshape(1, 5, IN), matrix(3)
    torch.testing.assert_close(t.linear(x, lambda inner: inner @ t.weight(w).T), x @ w.T)


@pytest.mark.parametrize("t", TRANSFORMS)
def test_proxy_loss_is_the_same_on_both_sides(t: str):
    t = TRANSFORMS[t]()
    w, error, x = matrix(3), matrix(5), matrix(6, rows=40)
    h = x.T @ x
    outside = w - t.restore(t.weight(w) - error)
    torch.testing.assert_close(proxy_loss(outside, h).sum(), proxy_loss(error, t.hessian(h)).sum())


@pytest.mark.parametrize("both", [False, True])
def test_hadamard_takes_the_metric_of_the_outputs_along(both: bool):
    t, w, error, x, y = Hadamard.random((OUT, IN), rng(7), both=both), matrix(3), matrix(5), matrix(6, rows=40), matrix(9, rows=40)
    h, g = x.T @ x, y[:, :OUT].T @ y[:, :OUT]
    outside = w - t.restore(t.weight(w) - error)
    torch.testing.assert_close(torch.trace(g @ outside @ h @ outside.T), torch.trace(t.outputs(g) @ error @ t.hessian(h) @ error.T))


@pytest.mark.parametrize("name", ROWS)
def test_row_scales_scale_the_loss_of_each_row(name: str):
    t, w, error, x = ROWS[name](), matrix(3), matrix(5), matrix(6, rows=40)
    h = x.T @ x
    outside = w - t.restore(t.weight(w) - error)
    inside = torch.einsum("oi,ij,oj->o", error, t.hessian(h), error)
    torch.testing.assert_close(torch.einsum("oi,ij,oj->o", outside, h, outside), rows().scale ** 2 * inside)


def test_tensors_go_out_and_in_again(t: Transform):
    again = t.with_tensors(dict(t.tensors()))
    assert torch.equal(again.weight(matrix(3)), t.weight(matrix(3))) and isinstance(t, Transform)


def test_permute_moves_column_perm_p_to_p():
    t = Permute(torch.tensor([2, 0, 1]))
    assert t.weight(torch.tensor([[10.0, 11.0, 12.0]])).tolist() == [[12.0, 10.0, 11.0]]


def test_hadamard_sides_are_what_they_say():
    """Rotating inputs keeps the norm of every row; rotating outputs does not."""
    w = torch.randn(OUT, IN, generator=rng(8), dtype=torch.float64)
    left, both = Hadamard.random((OUT, IN), rng(7)), Hadamard.random((OUT, IN), rng(7), both=True)
    torch.testing.assert_close(left.weight(w).norm(dim=1), w.norm(dim=1))
    assert not torch.allclose(both.weight(w).norm(dim=1), w.norm(dim=1))
