"""Mixture-of-experts layers as plain linears.

transformers stacks the experts of a layer into two 3-D parameters, gate_up_proj [E, 2I, H] and down_proj [E, H, I]. A stack is
no `nn.Linear`, so nothing that looks for linears sees it. `unstack_experts` replaces each stack by an `Experts` module of the
same interface whose expert e is a child named str(e) with two `nn.Linear`s that are views of the stack:

    y[t] = sum over slots s of w[t, s] * down_e(act(gate) * up),     gate, up = gate_up_e(x[t]).chunk(2),     e = index[t, s]

Making uses it to give every expert its own moments, serving to put quantized linears in place of the views.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_PROBE = 8.0
"""Spread of the values a gate is probed with; wide enough to reach the clamps seen in practice (they start at 7)."""


class Expert(nn.Module):
    """The two linears of one expert."""

    def __init__(self, gate_up: Float[Tensor, "gate_up hidden"], down: Float[Tensor, "hidden inner"]) -> None:
        super().__init__()
        self.gate_up_proj = _linear(gate_up)
        self.down_proj = _linear(down)


class Experts(nn.Module):
    """Drop-in for a stacked experts module: children "0" .. "E-1" are `Expert`s, views of the stacked parameters (or on meta)."""

    def __init__(
        self,
        gate_up: Float[Tensor, "experts gate_up hidden"],
        down: Float[Tensor, "experts hidden inner"],
        act_fn: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.num_experts = gate_up.shape[0]
        self.act_fn = act_fn
        for index in range(self.num_experts):
            self.add_module(str(index), Expert(gate_up[index], down[index]))

    def forward(
        self,
        hidden_states: Float[Tensor, "tok hidden"],
        top_k_index: Int[Tensor, "tok slots"],
        top_k_weights: Float[Tensor, "tok slots"],
    ) -> Float[Tensor, "tok hidden"]:
        """Each token goes through the experts its router chose; an expert nobody chose is not called."""
        out = torch.zeros_like(hidden_states)
        for index in range(self.num_experts):
            token, slot = torch.where(top_k_index == index)
            if token.numel() == 0:
                continue
            expert = self.get_submodule(str(index))
            gate, up = expert.gate_up_proj(hidden_states[token]).chunk(2, dim=-1)
            part = expert.down_proj(self.act_fn(gate) * up) * top_k_weights[token, slot, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


def unstack_experts(module: nn.Module) -> nn.Module:
    """`module` with every stacked experts module replaced in place by `Experts`; a stack of another kind is left alone.

    Returns `module` itself, or its replacement if it is a stack.
    """
    if is_stacked(module):
        return Experts(module.gate_up_proj, module.down_proj, module.act_fn)
    for name, child in list(module.named_children()):
        module.add_module(name, unstack_experts(child))
    return module


def is_stacked(module: nn.Module) -> bool:
    """Whether `module` is a stack that `Experts` can stand in for, judged by structure and behaviour, not by model.

    The two parameters and no others (so no bias), untransposed shapes, the layout flags transformers sets on its stacks, and a
    gate that computes act(gate) * up (some models clamp or shift it; those are refused).
    """
    parameters = dict(module.named_parameters())
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        return False
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if gate_up.dim() != 3 or down.dim() != 3 or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        return False
    flags = vars(module)
    if not flags.get("has_gate") or not flags.get("is_concatenated"):
        return False
    if any(flags.get(name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm")):
        return False
    return _plain_gate(module, width=gate_up.shape[1])


def _plain_gate(module: nn.Module, *, width: int) -> bool:
    probe = _PROBE * torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    gate, up = probe.chunk(2, dim=-1)
    return torch.allclose(module._apply_gate(probe), module.act_fn(gate) * up)


def _linear(weight: Float[Tensor, "out in"]) -> nn.Linear:
    """An `nn.Linear` without bias whose weight is `weight`'s own memory."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return linear
