import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, modeling_utils, pipeline
from transformers.utils import hub

import voroq
from voroq.errors import FormatError
from voroq.experts import Experts
from voroq.integrations.conftest import MODELS, tiny, write_model
from voroq.integrations.transformers import quant_linears
from voroq.layer import QuantLinear
from voroq.packed.conftest import rewrite
from voroq.packed.files import write_json
from voroq.packed.format import unpack

TOKENS = torch.arange(3, 19)[None]
CASES = [("llama", "vptq"), ("llama", "voroq"), ("llama-tied", "voroq"), ("qwen2", "vptq"), ("mixtral", "vptq"), ("qwen3-moe", "voroq")]


def open_model(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def stored_config(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_loading_gives_the_dequantized_model_and_saving_gives_the_same_bytes(tmp_path, kind, layout):
    packed = write_model(tmp_path / "a", kind, layout)
    model = open_model(tmp_path / "a")
    layers = quant_linears(model)
    assert set(layers) == set(packed)
    logits = model(TOKENS).logits
    assert logits.dtype == torch.bfloat16

    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert stored_config(tmp_path / "a") == stored_config(tmp_path / "b")
    assert torch.equal(open_model(tmp_path / "b")(TOKENS).logits, logits)

    dense = twin(kind, packed, load_file(tmp_path / "a" / "model.safetensors"))
    wide = open_model(tmp_path / "a", dtype=torch.float32)
    assert torch.allclose(wide(TOKENS).logits, dense(TOKENS).logits, atol=1e-4)


def twin(kind, packed, tensors):
    """The same model made by hand: every quantized weight dequantized, experts stacked as transformers has them."""
    model = tiny(kind)
    state = model.state_dict()
    for name in state:
        if name in tensors:
            state[name] = tensors[name].float()
        elif name.removesuffix(".weight") in packed:
            state[name] = unpack(packed[name.removesuffix(".weight")]).dequantize()
        elif ".experts." in name:
            head, tail = name.rsplit(".", 1)
            state[name] = torch.stack([unpack(packed[f"{head}.{e}.{tail}"]).dequantize() for e in range(state[name].shape[0])])
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("kind", "layout"), [("llama", "vptq"), ("qwen2", "voroq"), ("mixtral", "voroq")])
def test_dequantize_gives_a_plain_model(tmp_path, kind, layout):
    write_model(tmp_path / "a", kind, layout)
    logits = open_model(tmp_path / "a", dtype=torch.float32)(TOKENS).logits
    dense = open_model(tmp_path / "a", dtype=torch.float32).dequantize()
    assert not quant_linears(dense) and not any(isinstance(module, Experts) for module in dense.modules())
    assert torch.allclose(dense(TOKENS).logits, logits, atol=1e-5)
    dense.save_pretrained(tmp_path / "d")
    assert "quantization_config" not in json.loads((tmp_path / "d" / "config.json").read_text())
    assert torch.allclose(open_model(tmp_path / "d")(TOKENS).logits, logits, atol=1e-5)


def test_generate_works_and_a_device_map_changes_nothing(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    plain, mapped = open_model(tmp_path), open_model(tmp_path, device_map="auto")
    a, b = (model.generate(TOKENS, max_new_tokens=5, do_sample=False) for model in (plain, mapped))
    assert a.shape == (1, 21) and torch.equal(a, b)
    assert plain.hf_quantizer.is_trainable and plain.get_memory_footprint() > 0


def test_low_memory_and_pipelines_are_the_same_model(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    tokens = open_model(tmp_path).generate(TOKENS, max_new_tokens=6, do_sample=False)
    frugal = open_model(tmp_path, low_cpu_mem_usage=True, device_map="auto")
    assert torch.equal(frugal.generate(TOKENS, max_new_tokens=6, do_sample=False), tokens)
    writer = pipeline("text-generation", model=str(tmp_path), device_map="auto")
    assert len(quant_linears(writer.model)) == 14
    text = " ".join(f"w{token}" for token in TOKENS[0].tolist())
    written = writer(text, max_new_tokens=6, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert written == tokens[0].tolist()


@pytest.mark.parametrize("layout", ["vptq", "voroq"])
def test_what_is_pushed_to_the_hub_is_the_model(tmp_path, monkeypatch, layout):
    write_model(tmp_path / "a", "llama", layout)
    model = open_model(tmp_path / "a")
    pushed = tmp_path / "pushed"
    pushed.mkdir()

    def commit(*_, operations, **__):
        for operation in operations:
            with operation.as_file() as file:
                (pushed / operation.path_in_repo).write_bytes(file.read())

    repo = SimpleNamespace(repo_id="someone/model", url="hub/someone/model")
    for owner in (hub, HfApi):  # older releases bind the functions, newer ones ask the client
        monkeypatch.setattr(owner, "create_commit", commit, raising=False)
        monkeypatch.setattr(owner, "create_repo", lambda *_, **__: repo, raising=False)
    for owner in (hub, modeling_utils):
        monkeypatch.setattr(owner, "create_and_tag_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None), raising=False)
    model.push_to_hub("someone/model")
    names = {path.name for path in pushed.iterdir()}
    assert {"config.json", "model.safetensors"} <= names and not any(name.endswith((".bin", ".py")) for name in names)
    assert stored_config(pushed) == stored_config(tmp_path / "a")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "a", pushed))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(open_model(pushed)(TOKENS).logits, model(TOKENS).logits)


def test_layers_offloaded_to_disk_are_checked_and_used(tmp_path):
    write_model(tmp_path / "m", "llama", "voroq")
    logits = open_model(tmp_path / "m")(TOKENS).logits
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    offloaded = open_model(tmp_path / "m", device_map=places, offload_folder=tmp_path / "off")
    assert torch.equal(offloaded(TOKENS).logits, logits)


def test_a_base_model_and_a_new_head_load_from_the_same_folder(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    hidden = open_model(tmp_path).model(TOKENS).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(TOKENS).last_hidden_state, hidden)
    assert len(quant_linears(AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3))) == 14


def test_shared_entries_and_wide_permutations_load(tmp_path):
    packed = write_model(tmp_path, "llama", "vptq")
    config = json.loads((tmp_path / "config.json").read_text())
    logits = open_model(tmp_path)(TOKENS).logits
    layers = config["quantization_config"]["config_for_layers"]
    layers.update({name: entry | {"norm_dim": 0, "bias": None} for name, entry in layers.items()})
    wide = {f"{name}.perm" for name, p in packed.items() if p.spec.perm}
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name].long() & 0xFFFF for name in wide}))
    write_json(tmp_path / "config.json", config)
    assert torch.equal(open_model(tmp_path)(TOKENS).logits, logits)
    shared = layers.pop("model.layers.1.self_attn.k_proj")
    config["quantization_config"]["shared_layer_config"] = {"k_proj": shared}
    write_json(tmp_path / "config.json", config)
    assert torch.equal(open_model(tmp_path)(TOKENS).logits, logits)


Q = "model.layers.1.self_attn.q_proj"
DAMAGE = {
    "missing": (lambda t: t.pop(f"{Q}.indices"), f"tensor {Q}.indices is missing"),
    "stale": (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), f"tensor {Q}.weight does not belong"),
    "float": (lambda t: t.update({f"{Q}.indices": t[f"{Q}.indices"].float()}), f"{Q}.indices is float32, int32 is needed"),
    "shape": (lambda t: t.update({f"{Q}.indices": t[f"{Q}.indices"][:, :1]}), f"{Q}.indices has shape"),
    "nan": (lambda t: t[f"{Q}.centroids.weight"].fill_(float("nan")), f"{Q}.centroids.weight holds NaN"),
    "perm": (lambda t: t[f"{Q}.perm"].fill_(1), f"{Q}.perm is not a permutation"),
    "code": (lambda t: t[f"{Q}.outlier_indices"].fill_(-1), f"{Q}.outlier_indices holds code 65535"),
    "integers": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].view(torch.uint16)}), "tensor lm_head.weight is uint16"),
    "empty": (lambda t: t.update({"model.norm.weight": torch.empty(0)}), "tensor model.norm.weight is empty"),
    "norm": (lambda t: t.pop("model.norm.weight"), r"tensor model.norm.weight is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_that_transformers_would_load_is_refused(tmp_path, kind):
    change, message = DAMAGE[kind]
    packed = write_model(tmp_path, "llama", "vptq")
    assert packed[Q].spec.perm and packed[Q].spec.outliers
    rewrite(tmp_path, change)
    with pytest.raises(FormatError, match=message):
        open_model(tmp_path)


def test_more_experts_than_the_files_can_hold_are_refused_before_they_are_built(tmp_path):
    write_model(tmp_path, "mixtral", "voroq")
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"num_local_experts": 2**31 - 1})
    with pytest.raises(FormatError, match=r"asks for a tensor model.layers.0.*of shape \[2147483647"):
        open_model(tmp_path)


def test_a_name_that_the_model_does_not_have_is_refused(tmp_path):
    write_model(tmp_path, "llama", "voroq")
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    for name, message in [("model.layers.7.mlp.up_proj", "has none"), ("model.norm", "has a LlamaRMSNorm")]:
        layers[name] = layers[Q]
        write_json(tmp_path / "config.json", config)
        with pytest.raises(FormatError, match=f"linear {name}, where the model .* {message}"):
            open_model(tmp_path)
        del layers[name]
    layers[Q]["shape"] = [32, 33]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(FormatError, match="bands must cover 33 columns"):
        open_model(tmp_path)


def test_quantizing_while_loading_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        open_model(tmp_path, quantization_config=voroq.VoroqConfig("voroq", version=1, layers={}))


SCRIPT = """
import sys
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QuantLinear", type(model.model.layers[0].self_attn.q_proj)
assert not [f for f in sys.meta_path if type(f).__name__ == "_AfterImport"]
import transformers.quantizers.auto as auto
assert auto.__spec__.loader.__class__.__name__ == "SourceFileLoader", auto.__spec__.loader
"""
ORDERS = {
    "voroq first": "import voroq",
    "voroq first, looked at but not imported": "import voroq, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    "transformers first": "import transformers.modeling_utils\nimport voroq",
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_import_order_registers_the_loader(tmp_path, order):
    write_model(tmp_path, "llama", "voroq")
    script = SCRIPT.format(imports=ORDERS[order])
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_voroq_loads_neither_torch_nor_transformers():
    script = "import sys, voroq; voroq.FormatError; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_and_others_are_not():
    assert voroq.QuantLinear is QuantLinear
    assert {"load", "quantize_model", "METHODS"} <= set(dir(voroq))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        voroq.nothing  # noqa: B018


def test_every_kind_of_tiny_model_is_covered():
    assert {kind for kind, _ in CASES} == set(MODELS)
