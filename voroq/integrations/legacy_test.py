"""Folders in older layouts load, compute what the same folder in the current layout does, and are saved in the current one."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

import voroq
from voroq.errors import FormatError
from voroq.integrations.conftest import SIZES, config_of, make_first, make_old, tiny, write_gptqmodel, write_model, write_tokenizer
from voroq.integrations.shapes import model_defects, open_model_folder
from voroq.integrations.transformers import quant_linears
from voroq.packed.checkpoint import quantization_config
from voroq.packed.conftest import random_vptq, rewrite
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.format import pack, unpack

TOKENS = torch.arange(3, 19)[None]
ON_CPU = ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
PLACES = {"model.layers.0": "disk", **dict.fromkeys(ON_CPU, "cpu")}


def logits(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)(TOKENS).logits


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "mixtral"])
def test_unpacked_folders_load_and_are_saved_packed(tmp_path, kind, floats):
    packed = write_model(tmp_path / "m", kind, "vptq")
    expected, config = logits(tmp_path / "m"), config_of(tmp_path / "m")["quantization_config"]
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    make_old(tmp_path / "m", packed, floats=floats)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(model(TOKENS).logits, expected)
    assert {name: layer.spec for name, layer in quant_linears(model).items()} == {name: p.spec for name, p in packed.items()}
    model.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved")["quantization_config"] == config
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(logits(tmp_path / "saved"), expected)


@pytest.mark.parametrize("floats", [False, True])
def test_unpacked_layers_may_be_offloaded(tmp_path, floats, monkeypatch):
    monkeypatch.setenv("VOROQ_KERNEL", "reference")  # what is on disk keeps the old layout, which other kernels multiply
    packed = write_model(tmp_path / "m", "llama", "vptq")
    expected = logits(tmp_path / "m")
    make_old(tmp_path / "m", packed, floats=floats)
    assert torch.equal(logits(tmp_path / "m", device_map=PLACES, offload_folder=tmp_path / "off"), expected)
    assert torch.equal(logits(tmp_path / "m", device_map="auto"), expected)


def first_release(path, *, kind="llama"):
    """A folder whose config says `quant_config`, and the logits of the same model in the current layout."""
    packed = write_model(path, kind, "vptq")
    expected = logits(path)
    make_first(path, packed)
    return expected


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_first_releases_load_through_both_doors(tmp_path, kind):
    expected = first_release(tmp_path, kind=kind)
    model, _ = voroq.load(tmp_path, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(quant_linears(plain)) == len(quant_linears(model)) > 0
    assert torch.equal(model(TOKENS).logits, expected) and torch.equal(plain(TOKENS).logits, expected)
    for again in (model, plain):
        again.save_pretrained(tmp_path / "saved")
        config = config_of(tmp_path / "saved")
        assert "quant_config" not in config and config["quantization_config"]["quant_method"] == "vptq"
        assert torch.equal(logits(tmp_path / "saved"), expected)


def test_the_first_releases_load_whatever_way_their_config_is_read(tmp_path):
    expected = first_release(tmp_path)
    for config in (AutoConfig.from_pretrained(tmp_path), LlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(str(tmp_path))):
        assert not hasattr(config, "quant_config")
        assert torch.equal(logits(tmp_path, config=config), expected)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map="auto", low_cpu_mem_usage=True)
    assert torch.equal(model(TOKENS).logits, expected)


SCRIPT = """
import sys
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QuantLinear", type(model.model.layers[0].self_attn.q_proj)
assert not [f for f in sys.meta_path if type(f).__name__ == "_AfterImport"]
"""
ORDERS = {
    "voroq first": "import voroq\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport voroq",
    "config first": "import voroq\nfrom transformers import AutoConfig, AutoModelForCausalLM\nAutoConfig.from_pretrained(sys.argv[1])",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_first_releases_load_in_a_fresh_process(tmp_path, order):
    """Here the config is read before transformers' table of quantizers is imported."""
    first_release(tmp_path)
    script = SCRIPT.format(imports=ORDERS[order])
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


FOREIGN = [{"quant_config": {"w_bit": 4}}, {"quant_config": "int8"}, {"quant_config": {"a": {"bits": 4}}}, {"quant_config": None}, {}]


@pytest.mark.parametrize("fields", FOREIGN)
def test_another_quant_config_is_left_alone(tmp_path, fields):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path) | fields
    write_json(tmp_path / "config.json", config)
    assert AutoConfig.from_pretrained(tmp_path).to_dict().get("quant_config") == fields.get("quant_config")
    assert torch.equal(logits(tmp_path), model(TOKENS).logits)
    read, _ = PreTrainedConfig.get_config_dict(tmp_path)
    assert {name: value for name, value in read.items() if name in config} == config


def test_quantized_tensors_without_a_config_are_refused(tmp_path):
    for number, layout in enumerate(["vptq", "voroq"]):
        path = tmp_path / str(number)
        write_model(path, "llama", layout)
        write_json(path / "config.json", {name: value for name, value in config_of(path).items() if name != "quantization_config"})
        with pytest.raises(FormatError, match=r"config.json: model.layers.* is stored quantized .*no quantization_config"):
            voroq.load(path, device="cpu")


def write_llava(path):
    """A tiny Llava whose language model is quantized, named as on disk, and whose text_config says so."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(vision_config=CLIPVisionConfig(**small), text_config=LlamaConfig(**SIZES), image_token_index=5)
        LlavaForConditionalGeneration(config).bfloat16().save_pretrained(path)
    write_tokenizer(path)
    tensors, config = load_file(path / "model.safetensors"), config_of(path)
    sites = [name.removesuffix(".weight") for name in tensors if "language_model" in name and name.endswith("_proj.weight")]
    packed = {}
    for seed, name in enumerate(sites):
        weight = tensors.pop(f"{name}.weight")
        packed[name] = pack(random_vptq(*weight.shape, seed, steps=("affine", "permute")), torch.bfloat16, "vptq")
        tensors |= {f"{name}.{local}": tensor for local, tensor in packed[name].tensors.items()}
    write_safetensors(path / "model.safetensors", [Entry.of(name, tensor) for name, tensor in tensors.items()], {"format": "pt"})
    config["text_config"]["quantization_config"] = quantization_config("vptq", {name: p.spec for name, p in packed.items()})
    write_json(path / "config.json", config)
    return packed


def test_a_config_nested_in_a_text_config(tmp_path):
    packed = write_llava(tmp_path / "m")
    assert set(open_model_folder(tmp_path / "m").names()) == set(packed) and len(packed) == 14
    model, _ = voroq.load(tmp_path / "m", device="cpu")
    layers = quant_linears(model)
    assert len(layers) == 14
    by_end = {name.split(".layers.")[1]: stored for name, stored in packed.items()}
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize().weight, unpack(by_end[name.split(".layers.")[1]]).dequantize().bfloat16())
    model.save_pretrained(tmp_path / "saved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert torch.equal(plain(TOKENS).logits, model(TOKENS).logits)


def test_gptqmodel_folders_load_and_are_saved_as_official_ones(tmp_path):
    made = write_gptqmodel(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    layers = quant_linears(model)
    assert {name: layer.spec for name, layer in layers.items()} == {name: p.spec for name, p in made.items()}
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize().weight, unpack(made[name]).dequantize()), name
    model.save_pretrained(tmp_path / "saved")
    config = config_of(tmp_path / "saved")["quantization_config"]
    assert set(config) == {"quant_method", "config_for_layers"} and len(config["config_for_layers"]) == 14
    assert config["config_for_layers"]["model.layers.0.self_attn.q_proj"]["bias"] is True
    assert load_file(tmp_path / "saved" / "model.safetensors")["model.layers.0.self_attn.q_proj.perm"].dtype == torch.int16
    assert torch.equal(logits(tmp_path / "saved", dtype=torch.float32), model(TOKENS).logits)
    folder = open_model_folder(tmp_path / "m")
    assert folder.sites() == {name: p.spec for name, p in made.items()}
    assert model_defects(folder) == []


Q = "model.layers.1.self_attn.q_proj"


def test_a_linear_without_entry_and_an_entry_without_linear_are_named(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    config = config_of(tmp_path)
    layers = config["quantization_config"]["config_for_layers"]
    entry = layers.pop(Q)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(FormatError, match=f"{Q} is stored quantized .*no entry for it"):
        logits(tmp_path)
    for key, message in [("wq", "an entry 'wq', but no quantized linear"), ("self_attn.q_proj", "'self_attn.q_proj' has a dot")]:
        config["quantization_config"] |= {"shared_layer_config": {"q_proj": entry, key: entry}}
        write_json(tmp_path / "config.json", config)
        with pytest.raises(FormatError, match=message):
            logits(tmp_path)
    config["quantization_config"] |= {"shared_layer_config": {"q_proj": entry | {"vector_quant_dim": "in"}}}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(FormatError, match=rf"{Q} \(shared entry q_proj\): vector_quant_dim must be 'out'"):
        logits(tmp_path)


def test_shapes_that_a_shared_entry_leaves_out_come_from_the_model(tmp_path):
    packed = write_model(tmp_path, "llama", "vptq")
    config = config_of(tmp_path)
    layers = config["quantization_config"]["config_for_layers"]
    entry = layers.pop(Q)
    config["quantization_config"]["shared_layer_config"] = {"q_proj": {k: v for k, v in entry.items() if not k.endswith("features")}}
    write_json(tmp_path / "config.json", config)
    assert open_model_folder(tmp_path).spec(Q) == packed[Q].spec
    assert torch.isfinite(logits(tmp_path)).all()


def test_what_the_model_misses_is_listed(tmp_path):
    write_model(tmp_path, "llama-tied", "vptq")
    assert model_defects(open_model_folder(tmp_path)) == []
    gone = ["model.layers.0.input_layernorm.weight", "model.norm.weight"]
    rewrite(tmp_path, lambda t: [t.pop(name) for name in gone])
    assert [text.split()[1] for text in model_defects(open_model_folder(tmp_path))] == gone
