"""What tuning minimises."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 1 << 17
"""Logits looked at together on a CPU: few enough to stay in a core's cache from one step to the next."""


def divergence(target: Float[Tensor, "*batch v"], logits: Float[Tensor, "*batch v"]) -> Float[Tensor, ""]:
    """Mean over positions of KL(softmax(target) || softmax(logits)), in float32. A token of probability 0 in the target adds nothing.

    The gradient reaches `logits` only.
    """
    return _Divergence.apply(target.detach(), logits)


class _Divergence(torch.autograd.Function):
    """The gradient is (softmax(logits) - softmax(target)) / positions, in one pass over the logits where autograd makes seven."""

    @staticmethod
    def forward(context: Any, target: Tensor, logits: Tensor) -> Tensor:
        size = logits.shape[-1]
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if context.needs_input_grad[1] else None
        rows = max(1, CHUNK // size) if logits.device.type == "cpu" else logits.numel() // size
        parts = [t.reshape(-1, size).split(rows) for t in (target, logits, logits if gradient is None else gradient)]
        total = torch.zeros((), device=logits.device)
        for wanted, found, own in zip(*parts, strict=True):
            log_p, log_q = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
            p = log_p.exp()
            difference = log_p.clamp_min_(torch.finfo(torch.float32).min).sub_(log_q).nan_to_num_()  # 0 times infinity is to be nothing
            total += torch.dot(p.flatten(), difference.flatten())
            if gradient is not None:
                own.copy_(log_q.exp_().sub_(p))
        context.save_for_backward(gradient)
        context.positions = logits.numel() // size
        return total / context.positions

    @staticmethod
    def backward(context: Any, outer: Tensor) -> tuple[None, Tensor]:
        (gradient,) = context.saved_tensors
        return None, gradient * (outer / context.positions)
