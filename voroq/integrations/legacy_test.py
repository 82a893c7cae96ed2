"""Folders in older layouts load, compute what the same folder in the current layout does, and are saved in the current one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import voroq
from voroq.errors import FormatError
from voroq.integrations.conftest import SIZES, write_model, write_tokenizer
from voroq.integrations.shapes import model_defects, open_model_folder
from voroq.integrations.transformers import quant_linears
from voroq.packed.checkpoint import quantization_config
from voroq.packed.conftest import random_vptq, rewrite
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.format import pack, unpack
from voroq.packed.gptqmodel_test import CONFIG as GPTQMODEL
from voroq.packed.legacy import OldSpec

TOKENS = torch.arange(3, 19)[None]
ON_CPU = ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
PLACES = {"model.layers.0": "disk", **dict.fromkeys(ON_CPU, "cpu")}


def logits(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)(TOKENS).logits


def config_of(path):
    return json.loads((path / "config.json").read_text())


def make_old(path, packed, *, unpacked=True, floats=False):
    """Rewrite the folder in the layout of old writers."""
    config, tensors = config_of(path), {}
    for name, current in packed.items():
        old = OldSpec(current.spec, unpacked, floats)
        tensors |= {f"{name}.{local}": tensor for local, tensor in old.pack(unpack(current), torch.bfloat16).items()}
        entry = config["quantization_config"]["config_for_layers"][name]
        config["quantization_config"]["config_for_layers"][name] = old.to_json(bias=entry["bias"]) | {"enable_proxy_error": False}
    rewrite(path, lambda there: there.update(tensors))
    write_json(path / "config.json", config)


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


def test_the_first_releases_config_is_found_by_the_front_door(tmp_path):
    packed = write_model(tmp_path, "llama", "vptq")
    expected = logits(tmp_path)
    make_old(tmp_path, packed, unpacked=False)
    config = config_of(tmp_path)
    config["quant_config"] = config.pop("quantization_config")["config_for_layers"]
    write_json(tmp_path / "config.json", config)
    model, _ = voroq.load(tmp_path, device="cpu")
    assert torch.equal(model(TOKENS).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert "quant_config" not in config_of(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), expected)


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


def write_gptqmodel(path):
    """A folder as GPTQModel writes it, made from the current layout."""
    steps, shared = ("affine", "permute"), {"v": 2, "sizes": (8, 4), "groups": 2, "outliers": (2, 3, 4)}
    packed = write_model(path, "qwen2", "vptq")
    linears = {name: random_vptq(*p.spec.shape, seed, steps=steps, **shared) for seed, (name, p) in enumerate(packed.items())}
    made = {name: pack(q, torch.bfloat16, "vptq") for name, q in linears.items()}

    def change(tensors):
        for name in list(tensors):
            owner = next((site for site in packed if name.startswith(f"{site}.") and not name.endswith("proj.bias")), None)
            if owner is not None:
                del tensors[name]
        for name, p in made.items():
            for local, tensor in p.tensors.items():
                tensors[f"{name}.{local}"] = tensor.int() if local in ("perm", "outlier_indices") else tensor

    rewrite(path, change)
    entry = {"vector_lens": [3, 2], "num_centroids": [4, 8], "num_res_centroids": [-1, 4], "npercent": 4.0, "group_num": 2}
    write_json(path / "config.json", config_of(path) | {"quantization_config": GPTQMODEL | entry})
    return made


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
