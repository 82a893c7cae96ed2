import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import voroq
from voroq.errors import FormatError, VoroqError
from voroq.integrations.conftest import tiny, write_model, write_tokenizer
from voroq.integrations.transformers import quant_linears
from voroq.packed.conftest import random_pvq
from voroq.packed.files import write_json
from voroq.packed.format import bits_per_weight

TOKENS = torch.arange(3, 19)[None]


def test_the_front_door_gives_model_and_tokenizer(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    model, tokenizer = voroq.load(tmp_path, device="cpu")
    assert not model.training and len(quant_linears(model)) == 14
    assert tokenizer("w3 w4")["input_ids"] == [3, 4]
    wide, _ = voroq.load(str(tmp_path), device="cpu", dtype=torch.float32)
    dense, _ = voroq.load(tmp_path, device="cpu", dtype=torch.float32, dequantize=True)
    assert not quant_linears(dense)
    assert torch.allclose(dense(TOKENS).logits, wide(TOKENS).logits, atol=1e-5)


def test_expanding_at_load_changes_the_memory_and_not_the_weights(tmp_path):
    """Pyramids become integers; everything else stays, and what is saved loads again as it is."""
    write_model(tmp_path / "a", "llama", "voroq", linear=random_pvq)
    plain, _ = voroq.load(tmp_path / "a", device="cpu", dtype=torch.float32)
    wide, _ = voroq.load(tmp_path / "a", device="cpu", dtype=torch.float32, expand=True)
    before, after = quant_linears(plain), quant_linears(wide)
    assert all(torch.equal(after[name].dequantize().weight, layer.dequantize().weight) for name, layer in before.items())
    changed = {name for name, layer in before.items() if layer.spec != after[name].spec}
    assert 0 < len(changed) < len(before) and all(f"{name}.weight_pulses" in wide.state_dict() for name in changed)
    bits = [sum(bits_per_weight(layers[name].packed()) for name in changed) for layers in (before, after)]
    assert bits[1] > 1.2 * bits[0]
    assert torch.allclose(wide(TOKENS).logits, plain(TOKENS).logits, atol=1e-5)
    wide.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert {name: layer.spec for name, layer in quant_linears(again).items()} == {name: layer.spec for name, layer in after.items()}
    assert torch.equal(again(TOKENS).logits, wide(TOKENS).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "layout"), [("llama", "vptq"), ("mixtral", "voroq")])
def test_a_gpu_computes_what_the_cpu_computes(tmp_path, kind, layout):
    write_model(tmp_path, kind, layout)
    here, _ = voroq.load(tmp_path, device="cpu", dtype=torch.float32)
    there, _ = voroq.load(tmp_path, dtype=torch.float32)
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    assert torch.allclose(there(TOKENS.cuda()).logits.cpu(), here(TOKENS).logits, atol=1e-4)


def test_plain_models_load_too_decoders_and_encoders(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    for name in ("llama", "bert"):
        write_tokenizer(tmp_path / name)
        model, _ = voroq.load(tmp_path / name, device="cpu", dequantize=True)
        assert model(TOKENS).logits.shape == (1, 16, 64)


def change_config(path, **fields):
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {key: value for key, value in (config | fields).items() if value != "drop"})


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    write_model(tmp_path / "m", "llama", "voroq")
    shard = tmp_path / "m" / "model.safetensors"
    whole, config = shard.read_bytes(), (tmp_path / "m" / "config.json").read_text()
    cases = [
        (lambda: voroq.load(tmp_path / "none"), VoroqError, "there is no folder"),
        (lambda: voroq.load("./none"), VoroqError, "there is no folder"),
        (lambda: voroq.load(shard), VoroqError, "is a file"),
        (lambda: voroq.load(tmp_path), VoroqError, "has no config.json"),
        (lambda: voroq.load("a b c"), VoroqError, "valid hub id"),
        (lambda: voroq.load(tmp_path / "m", device="tpu9"), VoroqError, "unknown device"),
    ]
    if not torch.cuda.is_available():
        cases.append((lambda: voroq.load(tmp_path / "m", device="cuda"), VoroqError, "no CUDA device"))
    for act, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)

    shard.write_bytes(whole[:-100])
    with pytest.raises(FormatError, match=f"{shard} is truncated.*re-download it, or quantize again"):
        voroq.load(tmp_path / "m", device="cpu")
    shard.write_bytes(whole)
    (tmp_path / "m" / "config.json").write_text(config[:-10])
    with pytest.raises(FormatError, match=r"config.json: not readable as JSON"):
        voroq.load(tmp_path / "m", device="cpu")
    (tmp_path / "m" / "config.json").write_text(config)
    change_config(tmp_path / "m", quantization_config={"quant_method": "awq"})
    with pytest.raises(VoroqError, match="is quantized with 'awq'"):
        voroq.load(tmp_path / "m", device="cpu")
    change_config(tmp_path / "m", quantization_config={"quant_method": "voroq", "version": 1, "layers": {"a.b": {}}})
    with pytest.raises(FormatError, match=r"config.json: quantization config of a.b: shape"):
        voroq.load(tmp_path / "m", device="cpu")


def test_more_layers_than_the_files_have_tensors_are_refused_before_they_are_built(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    for name in ("num_hidden_layers", "text_config"):
        config = (tmp_path / "config.json").read_text()
        change_config(tmp_path, **{name: 10**30 if name == "num_hidden_layers" else {"num_layers": 10**6}})
        with pytest.raises(FormatError, match=r"config.json: num_.*layers is 1000"):
            voroq.load(tmp_path, device="cpu")
        (tmp_path / "config.json").write_text(config)


def test_a_missing_tokenizer_or_architecture_is_said(tmp_path):
    write_model(tmp_path, "llama", "voroq")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(VoroqError, match="has no tokenizer"):
        voroq.load(tmp_path, device="cpu")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(VoroqError, match="has no tokenizer"):
        voroq.load(tmp_path, device="cpu")
    write_tokenizer(tmp_path)
    change_config(tmp_path, model_type="unheard_of", architectures=["UnheardOf"])
    with pytest.raises(VoroqError, match="unheard_of") as caught:
        voroq.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_linear_without_an_entry_is_refused_whatever_class_the_model_opens_as(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    config = json.loads((tmp_path / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj"
    del config["quantization_config"]["config_for_layers"][name]
    write_json(tmp_path / "config.json", config | {"architectures": ["Unheard"]})
    with pytest.raises(FormatError, match=f"{name} is stored quantized .*no entry for it"):
        voroq.load(tmp_path, device="cpu")


def test_pickled_weights_are_not_opened(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(VoroqError, match="a model folder with safetensors weights is needed"):
        voroq.load(tmp_path, device="cpu")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: only safetensors files are read"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
