"""Losses as quadratic forms: what they report, their gradients and their diagonals are of one and the same form."""

import pytest
import torch

from voroq.rounding.feedback import Rounded
from voroq.rounding.kronecker_test import BANDS, IN, OUT, problem, spd
from voroq.rounding.metric import Guided, Loss, Metric, guided_metric
from voroq.tuning.centroids import refit

HEIGHTS = {"4x1": 4, "3x1 in two groups": 3, "5x1, padded": 5, "2x1 before 4x1": 4, "residual": 4}


def losses(name: str) -> dict[str, Loss]:
    _, h, g = problem()
    hs = torch.stack([spd(IN, 10 + k) * (k + 1) for k in range(3)])
    return {"inputs": Metric(h), "both sides": Metric(h, g), "guided": Guided(hs, HEIGHTS[name])}


def made(done: Rounded) -> torch.Tensor:
    return torch.cat([band.decode(codes, OUT) for band, codes in zip(done.bands, done.codes, strict=True)], dim=1)


def form(loss: Loss, error: torch.Tensor) -> float:
    return float((error * loss.gradient(error)).sum())


@pytest.mark.parametrize("kind", ["inputs", "both sides", "guided"])
@pytest.mark.parametrize("name", HEIGHTS)
def test_what_is_reported_is_the_form_whose_gradient_and_diagonal_are_given(name: str, kind: str):
    w, loss = problem()[0], losses(name)[kind]
    done = loss.feedback(w, BANDS[name]())
    assert float(done.loss.sum()) == pytest.approx(form(loss, w - made(done)), rel=1e-9)
    again = loss.descend(w, done.bands, done.codes, sweeps=3)
    assert float(again.loss.sum()) == pytest.approx(form(loss, w - made(again)), rel=1e-9)
    assert float(again.loss.sum()) <= float(done.loss.sum()) * (1 + 1e-12)
    for place in ((0, 0), (5, 3), (OUT - 1, IN - 1)):
        unit = torch.zeros_like(w)
        unit[place] = 1
        assert float(loss.diagonal(OUT)[place]) == pytest.approx(form(loss, unit), rel=1e-12)
    tables = refit(w, loss, again.bands, again.codes)
    fitted = Rounded(tables, again.codes, again.loss, again.targets)
    assert form(loss, w - made(fitted)) < form(loss, w - made(again))


@pytest.mark.parametrize("name", HEIGHTS)
def test_groups_that_are_alike_are_no_groups(name: str):
    w, h, _ = problem()
    one, many = Metric(h), Guided(h.expand(3, -1, -1), HEIGHTS[name])
    bands = BANDS[name]()
    for a, b in ((one.feedback(w, bands), many.feedback(w, bands)),):
        assert all(torch.equal(x, y) for x, y in zip(a.codes, b.codes, strict=True))
        torch.testing.assert_close(a.loss, b.loss)
        a, b = one.descend(w, bands, a.codes, sweeps=2), many.descend(w, bands, b.codes, sweeps=2)
        assert all(torch.equal(x, y) for x, y in zip(a.codes, b.codes, strict=True))
    torch.testing.assert_close(one.diagonal(OUT), many.diagonal(OUT))


def test_a_group_that_counts_more_is_rounded_better():
    w, h, _ = problem()
    hs = torch.stack([h, 100 * spd(IN, 11)])
    guided, plain = Guided(hs, 4), Metric(h)
    bands = BANDS["4x1"]()
    assert float(guided.feedback(w, bands).loss.sum()) < form(guided, w - made(plain.feedback(w, bands)))


def test_tiles_across_a_border_belong_to_the_group_they_begin_in():
    hs = torch.stack([torch.eye(2) * (k + 1) for k in range(3)])
    assert Guided(hs, 5).diagonal(12)[:, 0].tolist() == [1] * 5 + [2] * 5 + [3] * 2  # 4, 8 and 12 rows, rounded up to fives
    assert Guided(hs, 12).diagonal(12)[:, 0].tolist() == [1] * 12
    for out in (3, 4, 5):  # as torch.tensor_split cuts them
        expected = [k + 1.0 for k, part in enumerate(torch.arange(out).tensor_split(3)) for _ in part]
        assert Guided(hs, 1).diagonal(out)[:, 0].tolist() == expected


def test_moments_become_a_loss_of_mean_diagonal_one_and_say_what_that_took():
    second = torch.stack([spd(IN, 1) * 1e-6, torch.zeros(IN, IN, dtype=torch.float64)])
    loss, notes = guided_metric(second, 0.01, 4, lambda h: h)
    assert float(loss.hs[0].diagonal().mean()) == pytest.approx(2.02, rel=1e-6) and torch.linalg.cholesky(loss.hs[1]).isfinite().all()
    assert all(note.startswith("guided: ") for note in notes)
