"""The guide is what its formula says, and weighs by the gradients of the original's own answers."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from voroq.pipeline.gradients import PRIOR
from voroq.pipeline.guide import Guide, output_moments, outputs

NAMES = ["model.layers.0", "model.layers.1"]


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_the_guide_is_half_the_quadratic_form_of_the_outputs_errors():
    original, student = tiny(0), tiny(1)
    tokens = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2))
    moments = {name: torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}
    moments = {name: m @ m.T for name, m in moments.items()}
    guide = Guide(moments)
    with guide.watching(original, student):
        theirs = original(input_ids=tokens, output_hidden_states=True).hidden_states
        ours = student(input_ids=tokens, output_hidden_states=True).hidden_states
        found = guide()
    wanted = 0.0
    for place, name in enumerate(NAMES, start=1):
        for error in (ours[place] - theirs[place]).reshape(-1, 16):
            wanted += float(error @ moments[name] @ error) / 2 / tokens.numel()
    torch.testing.assert_close(float(found), wanted, rtol=1e-5, atol=0)


def test_the_guide_is_nothing_for_the_model_itself_and_its_gradient_reaches_the_student():
    original, student = tiny(0), tiny(0)
    weight = student.get_submodule("model.layers.0.mlp.down_proj").weight.requires_grad_(True)
    guide = Guide({name: torch.eye(16) for name in NAMES})
    tokens = torch.arange(6)[None]
    for change in (0.0, 0.1):
        with torch.no_grad():
            weight += change
        with guide.watching(original, student):
            original(input_ids=tokens)
            student(input_ids=tokens)
            found = guide()
        found.backward()
        assert (found > 0) == bool(change) and (weight.grad.abs().sum() > 0) == bool(change)
    assert not any(module._forward_hooks for module in student.modules())


def test_moments_are_those_of_explicit_gradients_and_predict_the_divergence():
    model = tiny(3)
    windows = torch.randint(0, 40, (64, 16), generator=torch.Generator().manual_seed(4))
    found = output_moments(model, NAMES, windows, at_once=8, seed=0)
    few = output_moments(model, NAMES, windows, at_once=64, seed=0)
    torch.testing.assert_close(found, few, rtol=1e-3, atol=1e-6)  # the same draws however many at a time
    tokens = windows.numel()
    shift = 1e-2 * torch.randn(16, generator=torch.Generator().manual_seed(5))
    log_p = model(input_ids=windows).logits.log_softmax(-1)
    hook = model.get_submodule(NAMES[1]).register_forward_hook(lambda module, args, output: output + shift * signs)
    torch.manual_seed(6)
    signs = torch.sign(torch.randn(64, 16, 1))
    log_q = model(input_ids=windows).logits.log_softmax(-1)
    hook.remove()
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    prior = PRIOR * 16 / (tokens + PRIOR * 16)
    moment = (found[NAMES[1]] - prior * torch.eye(16) * found[NAMES[1]].diagonal().mean()) / (1 - prior)
    assert abs(float(shift @ moment @ shift) / 2 / divergence - 1) < 0.35


def test_outputs_takes_the_first_of_several():
    class Two(torch.nn.Module):
        def forward(self, x):
            return x + 1, x

    model = torch.nn.Sequential(Two())
    seen = {}
    with outputs(model, ["0"], seen.__setitem__):
        model(torch.zeros(2))
    assert seen["0"].tolist() == [1, 1]
