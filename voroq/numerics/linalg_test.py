import pytest
import torch

from voroq.numerics.linalg import answering, damped, inverse_factor, proxy_loss, relative_proxy_loss


def spd(n: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / (2 * n)


def test_inverse_factor_is_upper_and_factors_the_inverse():
    h = spd(12)
    u = inverse_factor(h)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(h))


def test_proxy_loss_rows_sum_to_the_trace():
    h, delta = spd(7), torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(proxy_loss(delta, h).sum(), torch.trace(delta @ h @ delta.T))


def test_relative_proxy_loss_is_zero_for_the_weight_itself_and_one_for_nothing():
    h, w = spd(7), torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert relative_proxy_loss(w, w, h) == 0
    assert relative_proxy_loss(w, torch.zeros_like(w), h) == pytest.approx(1)


def test_damping_adds_its_share_of_the_mean_diagonal():
    h = spd(6)
    out, notes = damped(h, 0.01)
    assert notes == ()
    torch.testing.assert_close(out, h + 0.01 * h.diagonal().mean() * torch.eye(6, dtype=torch.float64))


def test_dead_columns_are_mended_and_reported():
    h = spd(6)
    h[2] = 0
    h[:, 2] = 0
    out, notes = damped(h, 0.01)
    inverse_factor(out)
    assert "1 of 6 input columns never moved" in notes[0]


def test_indefinite_hessian_gets_more_damping_and_says_so():
    h = spd(6).float()
    h = h - 1.05 * torch.linalg.eigvalsh(h)[0] * torch.eye(6) - 0.05 * torch.eye(6)
    out, notes = damped(h, 0.0001)
    inverse_factor(out)
    assert "not positive definite at damping 0.0001" in notes[-1]


def test_no_observation_at_all_gives_the_identity():
    out, _ = damped(torch.zeros(4, 4), 0.01)
    torch.testing.assert_close(out, 1.01 * torch.eye(4))


def test_nan_hessian_is_refused():
    h = torch.eye(3)
    h[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        damped(h, 0.01)


def test_the_answering_matrix_is_the_least_squares_fit_drawn_towards_the_original():
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(60, 7, generator=rng, dtype=torch.float64)
    other = x + 0.5 * torch.randn(60, 7, generator=rng, dtype=torch.float64)
    w = torch.randn(5, 7, generator=rng, dtype=torch.float64)
    second, shift = other.T @ other, (x - other).T @ other
    damping = 0.3
    ridge = (damping * second.diagonal().mean()).sqrt()
    left = torch.cat([other, ridge * torch.eye(7, dtype=torch.float64)])
    right = torch.cat([x @ w.T, ridge * w.T])
    assert torch.allclose(answering(w, second, shift, damping), torch.linalg.lstsq(left, right).solution.T)
    assert torch.equal(answering(w, second, torch.zeros_like(shift), damping), w)
