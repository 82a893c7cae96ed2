"""What tuning minimises."""

import torch
from jaxtyping import Float
from torch import Tensor


def divergence(target: Float[Tensor, "*batch v"], logits: Float[Tensor, "*batch v"]) -> Float[Tensor, ""]:
    """Mean over positions of KL(softmax(target) || softmax(logits)), in float32. A token of probability 0 in the target adds nothing."""
    log_p, log_q = target.float().log_softmax(-1), logits.float().log_softmax(-1)
    difference = torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p - log_q)
    return (log_p.exp() * difference).sum(-1).mean()
