"""The divergence and its gradient, held against autograd on the formula."""

import pytest
import torch

from voroq.tuning import losses
from voroq.tuning.losses import divergence


def literal(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    log_p, log_q = target.float().log_softmax(-1), logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q.flatten(0, -2), log_p.flatten(0, -2), log_target=True, reduction="batchmean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [10, losses.CHUNK])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 50), (11, 3)])
def test_value_and_gradient_are_those_of_the_formula(shape, at_once, dtype, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", at_once)
    rng = torch.Generator().manual_seed(0)
    target, found = (3 * torch.randn(2, *shape, generator=rng)).to(dtype).unbind()
    ours, theirs = found.clone().requires_grad_(), found.clone().requires_grad_()
    if len(shape) == 1:
        target, ours_in, theirs_in = target[None], ours[None], theirs[None]
    else:
        ours_in, theirs_in = ours, theirs
    loss, wanted = divergence(target, ours_in), literal(target, theirs_in)
    torch.testing.assert_close(loss, wanted)
    (2 * loss).backward()
    (2 * wanted).backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_tokens_that_the_target_rules_out_add_nothing_and_are_pushed_down():
    target = torch.tensor([[0.0, -torch.inf, 1.0]])
    logits = torch.tensor([[0.3, 0.1, 0.2]], requires_grad=True)
    loss = divergence(target, logits)
    p, q = target.softmax(-1), logits.detach().softmax(-1)
    torch.testing.assert_close(loss, (p * (p / q).log()).nansum())
    loss.backward()
    torch.testing.assert_close(logits.grad, q - p)


def test_tokens_that_both_rule_out_leave_all_finite():
    both = torch.tensor([[0.0, -torch.inf, 1.0]])
    logits = both.clone().requires_grad_()
    loss = divergence(both, logits)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad.abs().max() < 1e-6
