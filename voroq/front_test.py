import inspect
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import voroq
from voroq import front  # before anything is patched: it wraps the run it finds
from voroq.activations import Activations
from voroq.convert import convert
from voroq.errors import FormatError, VoroqError
from voroq.front import quantize_model, round_inputs, write_activations
from voroq.integrations.conftest import tiny, write_model, write_tokenizer
from voroq.integrations.load import load
from voroq.methods import PVQ, VPTQ
from voroq.packed.checkpoint import specs_from_config
from voroq.packed.format import unpack
from voroq.pipeline import run
from voroq.pipeline.plan import Plan, make_plan
from voroq.products import product
from voroq.report.inspect import inspect_folder
from voroq.report.verify import verify_folder
from voroq.streaming import VoroqConfig

TOKENS = torch.arange(3, 19)[None]


def test_the_front_door_takes_what_the_run_takes_and_leaves_a_card(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "quantize_model", lambda source, out, plan, **options: {"plan": plan, **options})
    carded = []
    monkeypatch.setattr(front, "write_card", carded.append)
    assert voroq.quantize_model("model", tmp_path, "plan", seed=3) == {"plan": "plan", "seed": 3}
    assert carded == [tmp_path]


def test_its_signature_is_the_runs():
    assert list(inspect.signature(voroq.quantize_model).parameters) == list(inspect.signature(run.quantize_model).parameters)


def folder_of_pyramids(path):
    tiny("qwen2").half().save_pretrained(path / "plain")
    config = VoroqConfig(method=PVQ(bits=4.0))
    AutoModelForCausalLM.from_pretrained(path / "plain", quantization_config=config).save_pretrained(path / "made")
    write_tokenizer(path / "made")
    return path / "made"


def test_activations_are_written_honoured_and_taken_back(tmp_path):
    """The logits are those of the layers' own meaning, and the weights stay."""
    folder = folder_of_pyramids(tmp_path)
    plain, _ = load(folder, dtype=torch.float32)
    before = (folder / "config.json").read_text()
    write_activations(folder, Activations(4, "pulses"))
    model, _ = load(folder, dtype=torch.float32)
    layer, twin = model.model.layers[0].self_attn.q_proj, plain.model.layers[0].self_attn.q_proj
    x = torch.randn(5, layer.in_features)
    assert torch.equal(layer(x), product(x, unpack(twin.packed()), Activations(4, "pulses")) + twin.bias)
    rough, exact = model(TOKENS).logits, plain(TOKENS).logits
    assert not torch.allclose(rough, exact, atol=1e-3) and "activations=4 bits pulses" in repr(layer)
    round_inputs(plain, Activations(4, "pulses"))
    assert torch.equal(plain(TOKENS).logits, rough)
    round_inputs(plain, Activations(8))
    assert 0 < (plain(TOKENS).logits - exact).abs().max() < 0.2 * (rough - exact).abs().max()
    assert all("inputs in 4 bits (pulses)" in site.settings for site in inspect_folder(folder).sites)
    assert not verify_folder(folder).defects
    with pytest.raises(VoroqError, match="rounds its inputs"):
        load(folder, dequantize=True)
    with pytest.raises(VoroqError, match="rounds the inputs of its linears"):
        convert(folder, tmp_path / "dense", to="dense")
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == json.loads(
        (folder / "config.json").read_text()
    )["quantization_config"]
    write_activations(folder, None)
    assert json.loads((folder / "config.json").read_text()) == json.loads(before)


def test_activations_of_no_sense_are_refused(tmp_path):
    write_model(tmp_path / "official", "llama", "vptq")
    with pytest.raises(VoroqError, match="not in the native layout"):
        write_activations(tmp_path / "official", Activations(8))
    with pytest.raises(VoroqError, match="only linears in the native layout"):
        round_inputs(load(tmp_path / "official")[0], Activations(8))
    for plan in (VPTQ(), Plan(VPTQ()), make_plan("vptq", 2.0, {})):
        with pytest.raises(VoroqError, match="official VPTQ layout has no place for activations"):
            quantize_model("nowhere", tmp_path / "out", plan, activations=Activations(8))
    folder = folder_of_pyramids(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    entry = next(iter(config["quantization_config"]["layers"].values()))
    for wrong, message in [
        ({"bits": 3, "kind": "integers"}, "bits must be an integer from 4 to 8"),
        ({"bits": 8, "kind": "floats"}, "kind must be one of integers, pulses"),
        ({"bits": 8, "kind": "integers", "group": 2}, "unknown field 'group'"),
        (8, "an object is needed"),
    ]:
        entry["activations"] = wrong
        with pytest.raises(FormatError, match=message):
            specs_from_config(config["quantization_config"])
