"""Moments from one block at a time are those of explicit hooks on the whole model."""

import pytest
import torch
from torch import nn

from voroq.errors import VoroqError
from voroq.experts import unstack_experts
from voroq.moments import Moments, observe
from voroq.pipeline.activations import Activations
from voroq.pipeline.model import OpenModel, open_model
from voroq.pipeline.observe import borrow_prior, observe_block, observe_shift, run_block
from voroq.pipeline.source import open_source
from voroq.pipeline.tiny_models_test import CONFIGS, save_tiny, tiny_tokens


def hooked_moments(model: nn.Module, names: set[str], tokens: torch.Tensor) -> dict[str, Moments]:
    """The slow twin: the whole model, every linear hooked, moments in float64."""
    sums = {}
    for name, module in unstack_experts(model).named_modules():
        if name in names:
            sums[name] = Moments(torch.zeros(module.in_features, module.in_features).double(), torch.zeros(module.in_features).double(), 0)

            def hook(_, args, name=name):
                sums[name] = observe(sums[name], args[0].reshape(-1, args[0].shape[-1]).double())

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=tokens)
    return sums


def prepared(name, folder, windows=3, batch=2, limit=0):
    whole, tokens = save_tiny(name, folder), tiny_tokens(windows)
    model = open_model(open_source(folder), device="cpu")
    return whole, tokens, model, model.capture(tokens, batch, limit=limit, folder=folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_are_those_of_hooks_on_the_whole_model(name, tmp_path):
    whole, tokens, model, states = prepared(name, tmp_path)
    names = {site.name for index in range(model.n_blocks) for site in model.sites(index)}
    expected = hooked_moments(whole, names, tokens)
    for index in range(model.n_blocks):
        block = model.load_block(index)
        moments, counts = observe_block(model, block, index, states, 2, outputs=states)
        model.drop_block(index)
        assert list(moments) == list(counts) == [site.name for site in model.sites(index)]
        for site, found in moments.items():
            assert found.count == counts[site] == expected[site].count
            torch.testing.assert_close(found.second.double(), expected[site].second, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.first.double(), expected[site].first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("Llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]),
        ("OPT", [{"q_proj", "k_proj", "v_proj"}]),
        ("Phi3", []),
        ("Bert", [{"query", "key", "value"}]),
        ("Mixtral", [{"q_proj", "k_proj", "v_proj"}]),
    ],
)
def test_sites_share_moments_exactly_when_they_share_inputs(name, shared, tmp_path):
    _, _, model, states = prepared(name, tmp_path)
    moments, _ = observe_block(model, model.load_block(1), 1, states, 2)
    groups: dict[int, list[str]] = {}
    for site, found in moments.items():
        groups.setdefault(id(found), []).append(site.rpartition(".")[2])
    assert [set(group) for group in groups.values() if len(group) > 1] == shared


def test_a_tensor_changed_in_between_is_not_shared(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden):
            out = self.a(hidden) + self.b(hidden)
            return out + self.c(hidden.add_(1))

    class Model(OpenModel):
        def __init__(self):
            self.device, self.blocks_name = torch.device("cpu"), "blocks"

        def forward_block(self, block, index, hidden):
            return block(hidden)

    states = Activations((2, 3, 4), torch.float32, limit=1 << 20, folder=tmp_path)
    states.write(0, torch.ones(2, 3, 4))
    moments, _ = observe_block(Model(), Block(), 0, states, 2)
    assert moments["blocks.0.a"] is moments["blocks.0.b"]
    assert moments["blocks.0.a"].first.tolist() == [6] * 4
    assert moments["blocks.0.c"].first.tolist() == [12] * 4


def test_every_token_is_counted_by_the_experts_it_went_to(tmp_path):
    _, tokens, model, states = prepared("Mixtral", tmp_path)
    _, counts = observe_block(model, model.load_block(0), 0, states, 2)
    down = [counts[f"model.layers.0.mlp.experts.{e}.down_proj"] for e in range(4)]
    assert sum(down) == 2 * tokens.numel()
    assert len(set(down)) > 1


def test_same_windows_same_bytes(tmp_path):
    _, _, model, states = prepared("Qwen3Moe", tmp_path)
    block = model.load_block(1)
    (first, _), (second, _) = (observe_block(model, block, 1, states, 2) for _ in range(2))
    assert all(torch.equal(first[site].second, second[site].second) for site in first)


def test_only_the_asked_sites_are_observed(tmp_path):
    _, _, model, states = prepared("Llama", tmp_path)
    wanted = {"model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"}
    block = model.load_block(0)
    some, _ = observe_block(model, block, 0, states, 2, sites=wanted)
    everything, _ = observe_block(model, block, 0, states, 2)
    assert set(some) == wanted
    assert all(torch.equal(some[site].second, everything[site].second) for site in wanted)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_outputs_are_those_of_running_the_block(tmp_path):
    _, _, model, states = prepared("Gemma2", tmp_path, limit=1 << 20)
    block = model.load_block(0)
    other = prepared("Gemma2", tmp_path / "other")[3]
    run_block(model, block, 0, states, 2, other)
    observe_block(model, block, 0, states, 2, outputs=states)
    assert torch.equal(states.read(0, 3), other.read(0, 3))


def test_bad_activations_name_the_site(tmp_path):
    _, _, model, states = prepared("Llama", tmp_path)
    block = model.load_block(0)
    block.mlp.up_proj.weight[3, 3] = float("inf")
    with pytest.raises(VoroqError, match=r"model\.layers\.0\.mlp\.down_proj"):
        observe_block(model, block, 0, states, 2)
    block.mlp.up_proj.weight[3, 3] = 0
    block.mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(VoroqError, match=r"outputs of model\.layers\.0"):
        observe_block(model, block, 0, states, 2)
    with pytest.raises(VoroqError, match=r"outputs of model\.layers\.0"):
        run_block(model, block, 0, states, 2, states)


def test_poor_experts_borrow_up_to_the_minimum():
    rng = torch.Generator().manual_seed(0)
    siblings = {f"e{n}": observe(Moments.empty(3), torch.randn(n, 3, generator=rng)) for n in (0, 4, 50, 100)}
    topped, poor = borrow_prior(siblings, 20)
    assert poor == ("e0", "e4")
    assert topped["e50"] is siblings["e50"]
    pooled = sum(m.second for m in siblings.values()) / 154
    torch.testing.assert_close(topped["e0"].hessian(), pooled)
    torch.testing.assert_close(topped["e4"].hessian(), (4 * siblings["e4"].hessian() + 16 * pooled) / 20)
    torch.testing.assert_close(topped["e4"].first, siblings["e4"].first + 16 * sum(m.first for m in siblings.values()) / 154)
    assert topped["e4"].count == 20
    assert borrow_prior(topped, 20) == (topped, ())


def test_if_no_expert_saw_a_token_the_prior_is_the_identity():
    topped, poor = borrow_prior({"a": Moments.empty(3), "b": Moments.empty(3)}, 8)
    assert poor == ("a", "b")
    torch.testing.assert_close(topped["a"].hessian(), torch.eye(3))


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_shifts_are_those_of_explicit_hooks_on_both_inputs(name, tmp_path):
    _, _, model, states = prepared(name, tmp_path)
    moved = prepared(name, tmp_path / "other")[3]
    for start, hidden in moved.batches(2):
        moved.write(start, hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(start)))
    block, names = model.load_block(0), [site.name for site in model.sites(0)]
    found = observe_shift(model, block, 0, states, moved, 2, sites=names)
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in names}
    for site, linear in model.linears(block, 0).items():
        linear.register_forward_pre_hook(lambda _, args, site=site: seen[site].append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for store in (states, moved):
            for _, hidden in store.batches(2):
                model.forward_block(block, 0, hidden)
    assert {site for site in names if "experts" not in site} <= set(found)
    for site, shift in found.items():
        half = len(seen[site]) // 2
        x, other = torch.cat(seen[site][:half]), torch.cat(seen[site][half:])
        torch.testing.assert_close(shift.double(), (x - other).T @ other, rtol=1e-4, atol=1e-3)
