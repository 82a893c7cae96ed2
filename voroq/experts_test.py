"""Unstacked experts compute what the stack computes."""

import copy

import pytest
import torch
from torch import nn

from voroq.experts import Experts, is_stacked, unstack_experts
from voroq.pipeline.tiny_models_test import tiny_model, tiny_tokens

MODELS = pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])


@MODELS
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_logits_are_those_of_the_stacked_model(name, implementation):
    stacked, tokens = tiny_model(name), tiny_tokens()
    stacked.set_experts_implementation(implementation)
    unstacked = unstack_experts(copy.deepcopy(stacked))
    count = sum(isinstance(module, Experts) for module in unstacked.modules())
    assert count == sum(is_stacked(module) for module in stacked.modules()) >= 2
    with torch.no_grad():
        torch.testing.assert_close(unstacked(tokens).logits, stacked(tokens).logits, rtol=1e-5, atol=1e-5)


def test_experts_match_the_sum_over_slots_written_out():
    rng = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(3, 8, 5, generator=rng), torch.randn(3, 5, 4, generator=rng)
    x, weight = torch.randn(6, 5, generator=rng), torch.rand(6, 2, generator=rng)
    index = torch.tensor([[0, 1], [2, 1], [1, 0], [3, 0], [2, 2], [3, 3]])  # 3 is transformers' "no expert"
    expected = torch.zeros(6, 5)
    for t in range(6):
        for s in range(2):
            if index[t, s] < 3:
                gate, up = (gate_up[index[t, s]] @ x[t]).chunk(2)
                expected[t] += weight[t, s] * (down[index[t, s]] @ (torch.tanh(gate) * up))
    torch.testing.assert_close(Experts(gate_up, down, torch.tanh)(x, index, weight), expected)


@MODELS
def test_experts_are_views_of_the_stack(name):
    stack = next(module for module in tiny_model(name).modules() if is_stacked(module))
    experts = unstack_experts(stack)
    for index in range(experts.num_experts):
        expert = experts.get_submodule(str(index))
        assert expert.gate_up_proj.weight.data_ptr() == stack.gate_up_proj[index].data_ptr()
        assert expert.down_proj.weight.data_ptr() == stack.down_proj[index].data_ptr()


def test_on_meta_nothing_is_allocated():
    model = unstack_experts(tiny_model("Mixtral").to("meta"))
    linears = [module for module in model.model.layers[0].mlp.experts.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 8
    assert all(linear.weight.is_meta for linear in linears)


def test_an_expert_without_tokens_is_not_called():
    experts = Experts(torch.ones(2, 4, 3), torch.ones(2, 3, 2), torch.tanh)
    experts.get_submodule("1").gate_up_proj.register_forward_hook(lambda *_: pytest.fail("called"))
    experts(torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


@pytest.mark.parametrize("name", ["has_bias", "is_transposed", "has_post_expert_norm"])
def test_stacks_of_another_layout_are_left_alone(name):
    model = tiny_model("Mixtral")
    stack = model.model.layers[1].mlp.experts
    setattr(stack, name, True)
    unstack_experts(model)
    assert model.model.layers[1].mlp.experts is stack
    assert isinstance(model.model.layers[0].mlp.experts, Experts)


def test_stacks_that_are_not_what_experts_compute_are_left_alone():
    def clamped_gate(x):
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate).clamp(max=7.0) * up

    def changed(change):
        stack = tiny_model("Mixtral").model.layers[0].mlp.experts
        change(stack)
        return stack

    assert is_stacked(changed(lambda stack: None))
    assert not is_stacked(changed(lambda stack: setattr(stack, "_apply_gate", clamped_gate)))
    assert not is_stacked(changed(lambda stack: stack.register_parameter("gate_up_proj_bias", nn.Parameter(torch.zeros(4, 96)))))
    assert not is_stacked(changed(lambda stack: setattr(stack, "down_proj", nn.Parameter(stack.down_proj.data.mT.contiguous()))))
    assert not is_stacked(changed(lambda stack: vars(stack).pop("has_gate")))
