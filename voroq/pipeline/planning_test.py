"""Sensitivities held against explicit perturbations; plan files there and back."""

import json
from dataclasses import replace

import pytest
import torch

from voroq import native
from voroq.codebook.pyramid import Pulses
from voroq.errors import VoroqError
from voroq.experts import unstack_experts
from voroq.methods import GPTQ, PVQ, VPTQ, probing
from voroq.methods.vptq import column_costs
from voroq.numerics.linalg import damped, padded_without
from voroq.pipeline.channels import DAMPING, MOST, channels_of
from voroq.pipeline.gradients import output_gradients
from voroq.pipeline.observe import observe_block
from voroq.pipeline.observe_test import prepared
from voroq.pipeline.plan import Budget, Plan, distortion, make_plan, steep
from voroq.pipeline.planning import plan_model, read_plan
from voroq.pipeline.progress import Silent
from voroq.pipeline.run import quantize_model
from voroq.pipeline.sensitivity import probe, responses, tightened
from voroq.pipeline.text import DEMO_MODEL


def test_responses_predict_what_a_small_error_costs(tmp_path):
    """Against the true KL of the perturbed model. One sampled label a token, so the average over many tokens is compared."""
    whole, tokens, model, states = prepared("Llama", tmp_path, windows=64)
    stores = output_gradients(model, tokens, states, 2, seed=1, limit=1 << 30, folder=tmp_path, progress=Silent())
    block = model.load_block(0)
    names = [site.name for site in model.sites(0)]
    rng = torch.Generator().manual_seed(2)
    errors = {name: 0.01 * torch.randn(model.linears(block, 0)[name].weight.shape, generator=rng) for name in names}
    found = responses(model, block, 0, states, stores[0], 2, {name: torch.stack([error, 2 * error]) for name, error in errors.items()})
    with torch.no_grad():
        plain = unstack_experts(whole)
        before = plain(input_ids=tokens).logits.double().log_softmax(-1)
        for name in names:
            weight = plain.get_submodule(name).weight
            weight -= errors[name]
            after = plain(input_ids=tokens).logits.double().log_softmax(-1)
            weight += errors[name]
            true = float((before.exp() * (before - after)).sum(-1).mean())
            once, twice = (found[name].double().square().mean(1) / 2).tolist()
            assert twice == pytest.approx(4 * once, rel=1e-5)
            assert once == pytest.approx(true, rel=0.5), name  # labels are a sample, and tokens answer for later ones too


def test_probing_weighs_every_site_that_the_plan_rounds(tmp_path):
    _, tokens, model, _ = prepared("Llama", tmp_path)
    plan = Plan(VPTQ(vector_length=2, table_bits=4), (("*.down_proj", None),))
    found = probe(model, plan, tokens, dtype=torch.float32, seed=0, folder=tmp_path, progress=Silent()).sites
    assert set(found) == {site.name for index in range(3) for site in model.sites(index) if "down_proj" not in site.name}
    assert all(worth.kl > 0 for worth in found.values())


def test_channels_left_out_of_all_blocks_cost_what_the_probe_says(tmp_path, monkeypatch):
    """Against the true KL of the model without them, and exactly: responses of all blocks add up before they are squared."""
    whole, tokens, model, states = prepared("Llama", tmp_path, windows=64)
    channels = channels_of(model)
    pruned = []
    for index, (down, *_) in enumerate(channels.mlps):
        block = model.load_block(index)
        moments, _ = observe_block(model, block, index, states, 2, sites=[down], outputs=states)
        h, w = damped(moments[down].hessian(), DAMPING)[0], model.linears(block, index)[down].weight.detach()
        order = column_costs(w, h).argsort(stable=True)
        pruned.append((down, [padded_without(w, h, order[:gone]) for gone in channels.steps]))
    plan, text = Plan(VPTQ(vector_length=2, table_bits=4)), {"dtype": torch.float32, "seed": 1, "folder": tmp_path, "progress": Silent()}
    assert probe(model, plan, tokens, **text).left_out == ()
    heard = []
    monkeypatch.setattr("voroq.pipeline.sensitivity.responses", lambda *args: heard.append(responses(*args)) or heard[-1])
    found = probe(model, plan, tokens, channels=channels, **text)
    together = sum(block[down].double()[1:] for block, (down, *_) in zip(heard, channels.mlps, strict=True))
    assert found.left_out == pytest.approx((together.square().mean(1) / 2).tolist(), rel=1e-4)
    with torch.no_grad():
        plain = unstack_experts(whole)
        before = plain(input_ids=tokens).logits.double().log_softmax(-1)
        for step, expected in enumerate(found.left_out):
            for down, weights in pruned:
                plain.get_submodule(down).weight.copy_(weights[step])
            after = plain(input_ids=tokens).logits.double().log_softmax(-1)
            true = float((before.exp() * (before - after)).sum(-1).mean())
            assert expected == pytest.approx(true, rel=0.5, abs=1e-9)
    assert found.left_out[0] == 0 < found.left_out[1] < found.left_out[MOST]


def test_without_its_cheap_channels_an_mlp_has_no_room_for_the_others():
    costs = torch.tensor([[1.0, 4.0, 16.0, 64.0]])
    assert tightened(costs, 0, True) == tightened(costs, 0, False) == 1
    assert tightened(costs, 2, True) == pytest.approx(0.5 * 32 / 8)  # geometric means
    assert tightened(costs, 2, False) == pytest.approx(80 / 85)
    assert tightened(torch.ones(2, 4), 1, True) == pytest.approx(0.75)


def test_a_narrower_plan_has_as_many_bits_in_all_and_is_taken_where_it_is_better(monkeypatch):
    budget = make_plan("vptq", 2.3, {"kmeans_steps": "2", "rounds": "0", "permute": "no"})
    text = {"calibration": "calibration-c4", "samples": 4, "context": 64, "device": "cpu"}
    wide, narrow = plan_model(DEMO_MODEL, budget, **text), plan_model(DEMO_MODEL, budget, narrower=True, **text)
    assert wide.channels is None and narrow.channels in range(640, 1024, 64)
    assert narrow.kl < wide.kl
    weights = {plan.channels: sum(row["shape"][0] * row["shape"][1] for row in plan.rows) for plan in (wide, narrow)}
    assert weights[None] - weights[narrow.channels] == 5 * 3 * 384 * (1024 - narrow.channels)
    assert 2.28 * weights[None] < narrow.bits_per_weight * weights[narrow.channels] <= 2.3 * weights[None]
    dear = {"left_out": (0.0, *[wide.kl] * MOST)}
    monkeypatch.setattr("voroq.pipeline.planning.probe", lambda *args, **rest: replace(probe(*args, **rest), **dear))
    assert plan_model(DEMO_MODEL, budget, narrower=True, **text) == wide


def test_pyramids_are_probed_by_inputs_alone_where_both_sides_are_slow(tmp_path, monkeypatch):
    _, tokens, model, _ = prepared("Llama", tmp_path)
    seen, call = [], PVQ.__call__

    def keep(self, w, moments, rng):
        seen.append(moments.outputs is not None)
        return call(self, w, replace(moments, outputs=None), rng)

    monkeypatch.setattr(PVQ, "__call__", keep)
    for library in (object(), None):
        monkeypatch.setattr(native, "library", lambda library=library: library)
        plan = Plan(None, (("*.0.*down_proj", PVQ(bits=2.0, rotation="none", sweeps=0)),))
        if library is not None:
            monkeypatch.setattr(Pulses, "is_native", lambda self, v: False)
            monkeypatch.setattr("voroq.numerics.nearest.is_native", lambda v: False)
        probe(model, plan, tokens, dtype=torch.float32, seed=0, folder=tmp_path, progress=Silent())
    assert seen == [True, False]


def test_a_plan_spends_its_bits_where_they_are_worth_most_and_survives_its_file(tmp_path):
    budget = make_plan("vptq", 2.3, {"kmeans_steps": "2", "rounds": "0", "permute": "no"})  # columns in their own order: none are thinned
    planned = plan_model(DEMO_MODEL, budget, calibration="calibration-c4", samples=4, context=64, device="cpu")
    assert planned.bits_per_weight <= 2.3
    planned.write(tmp_path / "plan.json", "demo")
    again = read_plan(tmp_path / "plan.json")
    assert again == planned.plan
    uniform = budget.plan([(row["name"], tuple(row["shape"])) for row in planned.rows])
    price = {row["name"]: row["kl"] / steep(distortion(planned.plan.method_for(row["name"]))) for row in planned.rows}
    cost = {plan: sum(each * steep(distortion(plan.method_for(name))) for name, each in price.items()) for plan in (uniform, planned.plan)}
    assert cost[planned.plan] < 0.97 * cost[uniform]
    assert len({method for _, method in planned.plan.rules}) > 3
    for block in range(5):
        gate, up = (planned.plan.method_for(f"model.layers.{block}.mlp.{name}_proj") for name in ("gate", "up"))
        assert gate.vector_length == up.vector_length


def test_a_plan_leaves_next_to_nothing_to_columns_that_are_worth_nothing(tmp_path):
    """The first block's down_proj has many. Bits saved there make the plan better, and the file says what was done."""
    options = {"kmeans_steps": "2", "rounds": "0"}
    text = {"calibration": "calibration-c4", "samples": 4, "context": 64, "device": "cpu"}
    thin = plan_model(DEMO_MODEL, make_plan("vptq", 2.3, options), **text)
    full = plan_model(DEMO_MODEL, make_plan("vptq", 2.3, {**options, "outlier_percent": "0"}), **text)
    assert thin.bits_per_weight <= 2.3 and thin.kl < 0.95 * full.kl
    down = thin.plan.method_for("model.layers.0.mlp.down_proj")
    assert down.outliers == "cheapest" and down.outlier_percent >= 20
    assert all(method.outlier_percent == 0 for _, method in full.plan.rules)
    thin.write(tmp_path / "plan.json", "demo")
    assert read_plan(tmp_path / "plan.json") == thin.plan


def test_large_errors_cost_more_than_in_proportion():
    assert steep(0.1) == pytest.approx(0.135) and steep(0.2) > 2 * steep(0.1)


def test_a_plan_keeps_a_size(tmp_path):
    budget = make_plan("vptq", 4.0, {"kmeans_steps": "2", "rounds": "0"})
    planned = plan_model(DEMO_MODEL, budget, size=9_000_000, calibration="calibration-c4", samples=2, context=64, device="cpu")
    quantize_model(DEMO_MODEL, tmp_path / "out", planned.plan, calibration="calibration-c4", samples=2, context=64, device="cpu")
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 8_800_000 < stored < 9_030_000  # headers are not counted
    with pytest.raises(VoroqError, match="larger --size"):
        plan_model(DEMO_MODEL, budget, size=1000, device="cpu")


def test_edited_plans(tmp_path):
    path = tmp_path / "plan.json"
    sites = [{"name": "*.q_proj", "method": None}, {"name": "*", "method": "gptq", "options": {"bits": 3}, "note": "mine"}]
    path.write_text(json.dumps({"voroq_plan": 1, "sites": sites}))
    plan = read_plan(path)
    assert plan.method_for("a.q_proj") is None and plan.method_for("a.k_proj") == GPTQ(bits=3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "not a plan"),
        ('{"voroq_plan": 1}', "not a plan"),
        ('{"voroq_plan": 1, "sites": [{"method": "vptq"}]}', 'needs "name"'),
        ('{"voroq_plan": 1, "sites": [{"name": "x", "method": "nope"}]}', "unknown method 'nope'"),
        ('{"voroq_plan": 1, "sites": [{"name": "x", "method": "vptq", "options": []}]}', "must be an object"),
        ('{"voroq_plan": 1, "sites": [{"name": "x", "method": "vptq", "options": {"tables": 3}}]}', "no option 'tables'"),
        ('{"voroq_plan": 1, "sites": [{"name": "x", "method": "vptq", "options": {"table_bits": 99}}]}', "out of range"),
    ],
)
def test_broken_plans_are_refused_by_name(tmp_path, text, complaint):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(VoroqError, match=complaint):
        read_plan(path)
    with pytest.raises(VoroqError, match="voroq plan"):
        read_plan(tmp_path / "none.json")


def test_what_sets_the_rate_cannot_be_allocated():
    with pytest.raises(VoroqError, match="nothing to allocate"):
        plan_model(DEMO_MODEL, make_plan("vptq", None, {"table_bits": "8"}))
    assert isinstance(make_plan("vptq", 2.0, {}), Budget)


@pytest.mark.parametrize("method", [VPTQ(vector_length=3, table_bits=5, residual_bits=4), PVQ(bits=2.5), GPTQ(bits=3)])
def test_probing_keeps_the_rate_and_leaves_the_search_out(method):
    quick = probing(method)
    assert quick.stored_bits((96, 64), 16) == method.stored_bits((96, 64), 16) and type(quick) is type(method)
    assert quick == method if isinstance(method, GPTQ) else quick != method
