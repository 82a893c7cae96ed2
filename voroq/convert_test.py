"""Conversions are lossless, complete, and leave nothing behind when they fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from voroq.convert import convert
from voroq.errors import FormatError, VoroqError
from voroq.integrations.conftest import config_of, make_old, tiny, write_gptqmodel, write_model
from voroq.integrations.legacy_test import TOKENS, logits, write_llava
from voroq.integrations.shapes import open_model_folder
from voroq.integrations.transformers import quant_linears
from voroq.packed.checkpoint import open_folder, read_packed
from voroq.packed.conftest import random_vptq, rewrite
from voroq.packed.files import Entry, sha256_of, write_json, write_safetensors
from voroq.packed.format import pack, unpack
from voroq.packed.legacy import OldSpec
from voroq.report.verify import verify_folder


def weights(path):
    """Every linear dequantized, every other tensor as it is."""
    folder = open_model_folder(path)
    owned = {f"{name}.{s.name}" for name, spec in folder.sites().items() for s in spec.layout()}
    kept = {name: info.load() for name, info in folder.tensors.items() if name not in owned}
    return kept | {f"{name}.weight": unpack(folder.packed(name)).dequantize() for name in folder.sites()}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "mixtral"])
def test_an_old_folder_becomes_a_current_one_of_the_same_weights(tmp_path, kind, floats):
    packed = write_model(tmp_path / "old", kind, "vptq")
    expected, first = logits(tmp_path / "old"), config_of(tmp_path / "old")
    make_old(tmp_path / "old", packed, floats=floats)
    before = weights(tmp_path / "old")
    done = convert(tmp_path / "old", tmp_path / "new", absorb=False)
    assert (done.layout, done.linears, done.changed, done.absorbed) == ("vptq", len(packed), len(packed), 0)
    assert_same_weights(before, weights(tmp_path / "new"))
    assert config_of(tmp_path / "new") == first
    assert open_folder(tmp_path / "new").sites() == {name: p.spec for name, p in packed.items()}
    assert torch.equal(logits(tmp_path / "new"), expected)
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    assert done.shards == {"model.safetensors": sha256_of(tmp_path / "new" / "model.safetensors")}
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


VARIANTS = {
    "larger residual": {"sizes": (4, 16)},
    "rows": {"sizes": (16, 4), "steps": ("rows", "permute")},
    "outliers": {"sizes": (16,), "outliers": (4, 3, 8), "steps": ("affine", "permute")},
    "groups": {"groups": 2, "sizes": (2, 2), "steps": ("permute",)},
    "one group": {"sizes": (64,), "v": 5, "steps": ("affine", "permute")},
    "largest table": {"sizes": (65536, 2), "v": 2, "steps": ("permute",)},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_its_weights_and_loses_what_is_needless(tmp_path, variant, dtype):
    q, name = random_vptq(10, 32, 1, **VARIANTS[variant]), "model.layers.0.self_attn.q_proj"
    sizes = VARIANTS[variant]["sizes"]
    spec = type(pack(random_vptq(10, 32, 1), dtype, "vptq").spec).of
    if sizes[-1] > sizes[0]:  # the writer refuses it, other writers do not
        right = random_vptq(10, 32, 1, **VARIANTS[variant] | {"sizes": sizes[::-1]})
        bands = [replace(b, codebook=type(b.codebook)(b.codebook.stages[::-1])) for b in right.bands]
        q = replace(right, bands=tuple(bands), codes=tuple(codes.flip(-1) for codes in right.codes))
        current = replace(spec(right), k=sizes[0], residual=sizes[1])
    else:
        current = spec(q)
    old = OldSpec(current, True, False)
    (tmp_path / "old").mkdir()
    tensors = old.pack(q, dtype)
    write_safetensors(tmp_path / "old" / "model.safetensors", [Entry.of(f"{name}.{n}", t) for n, t in tensors.items()], {})
    write_json(tmp_path / "old" / "config.json", {"quant_config": {name: old.to_json()}})
    done = convert(tmp_path / "old", tmp_path / "new")
    assert_same_weights(weights(tmp_path / "old"), weights(tmp_path / "new"))
    new = read_packed(tmp_path / "new", name).spec
    assert (new.k >= (new.residual or 0)) and new.norm_dim == int(variant == "rows")
    assert new.perm == (variant in ("outliers", "groups")) and done.absorbed == (variant in ("rows", "one group", "largest table"))
    assert "quant_config" not in config_of(tmp_path / "new")


def test_shards_are_as_large_as_asked_and_listed(tmp_path):
    write_model(tmp_path / "m", "llama", "vptq")
    seen = []
    done = convert(tmp_path / "m", tmp_path / "new", shard_bytes=5_000, progress=lambda *at: seen.append(at))
    assert len(done.shards) > 3 and seen == [(i + 1, len(done.shards)) for i in range(len(done.shards))]
    assert all((tmp_path / "new" / name).stat().st_size < 9_000 for name in done.shards)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.bytes_after and set(index["weight_map"].values()) == set(done.shards)
    assert_same_weights(weights(tmp_path / "m"), weights(tmp_path / "new"))
    again = convert(tmp_path / "new", tmp_path / "again")
    assert list(again.shards) == ["model.safetensors"]
    assert_same_weights(weights(tmp_path / "m"), weights(tmp_path / "again"))


CARD = "---\nlicense: mit\nbase_model: org/original\ntags: [secret]\n---\n# Old\n"


def test_the_card_keeps_the_license_and_says_what_was_done_and_how_to_load(tmp_path):
    write_model(tmp_path / "m", "llama", "vptq")
    (tmp_path / "m" / "README.md").write_text(CARD)
    write_json(tmp_path / "m" / "voroq_report.json", {"method": "vptq", "seed": 7, "source": "/home/me/secret"})
    convert(tmp_path / "m", tmp_path / "new", dtype="float16")
    convert(tmp_path / "m", tmp_path / "plain", to="dense")
    new, plain = ((tmp_path / name / "README.md").read_text() for name in ("new", "plain"))
    for card in (new, plain):
        assert "license: mit" in card and "base_model: org/original" in card and "secret" not in card
        assert "- seed: 7" in card and "None" not in card and str(tmp_path) not in card
    assert "library_name: voroq" in new and 'voroq.load("new")' in new and "vptq layout; 0 of 14 linears were stored otherwise" in new
    assert "real numbers are rounded to float16" in new and "bits per weight" in new
    assert "library_name: transformers" in plain and 'from_pretrained("plain")' in plain
    assert "import voroq" not in plain and "14 linears are dense" in plain and "bits per weight" not in plain


def test_folders_without_a_card_get_one_that_claims_nothing(tmp_path):
    packed = write_model(tmp_path / "old", "qwen2", "vptq")
    make_old(tmp_path / "old", packed)
    convert(tmp_path / "old", tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    assert "license" not in card and "base_model" not in card and "method" not in card and "None" not in card
    assert "14 of 14 linears were stored otherwise before; 0 permutations were absorbed; their weights are the same to the bit." in card


def test_the_native_layout_is_sharded_anew_and_made_dense(tmp_path):
    write_model(tmp_path / "m", "llama", "voroq")
    done = convert(tmp_path / "m", tmp_path / "new")
    assert (done.layout, done.changed) == ("voroq", 0)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "new"))
    assert a.keys() == b.keys() and all(torch.equal(b[name], tensor) for name, tensor in a.items())
    with pytest.raises(VoroqError, match="has the voroq layout, which cannot be written as vptq"):
        convert(tmp_path / "m", tmp_path / "other", to="vptq")


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert "voroq" not in sys.modules
torch.save(model(torch.arange(3, 19)[None]).logits, sys.argv[2])
"""


@pytest.mark.parametrize(("kind", "layout"), [("llama-tied", "vptq"), ("qwen2", "voroq"), ("mixtral", "vptq"), ("qwen3-moe", "voroq")])
def test_a_dense_folder_opens_without_us(tmp_path, kind, layout):
    write_model(tmp_path / "m", kind, layout)
    done = convert(tmp_path / "m", tmp_path / "dense", to="dense")
    assert "quantization_config" not in config_of(tmp_path / "dense")
    assert {info.dtype for info in open_folder(tmp_path / "dense").tensors.values()} == {torch.bfloat16}
    assert done.bytes_after > done.bytes_before
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "dense"), str(tmp_path / "logits")], check=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").dequantize()
    assert torch.equal(torch.load(tmp_path / "logits"), loaded(TOKENS).logits)
    assert verify_folder(tmp_path / "dense").defects == []


def test_dense_in_another_type(tmp_path):
    write_model(tmp_path / "m", "llama", "vptq", dtype=torch.float16)
    convert(tmp_path / "m", tmp_path / "half", to="dense")
    assert {info.dtype for info in open_folder(tmp_path / "half").tensors.values()} == {torch.float16}
    convert(tmp_path / "m", tmp_path / "wide", to="dense", dtype="float32")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert config_of(tmp_path / "wide")["dtype"] == "float32"
    expected = {name: tensor.float() for name, tensor in weights(tmp_path / "m").items()}
    assert_same_weights(wide, expected)
    convert(tmp_path / "m", tmp_path / "rounded", dtype="bfloat16")
    reals = [info.dtype for info in open_folder(tmp_path / "rounded").tensors.values() if info.dtype.is_floating_point]
    assert set(reals) == {torch.bfloat16} and len(quant_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "rounded"))) == 14


def test_gptqmodel_and_nested_configs_become_official_folders(tmp_path):
    write_gptqmodel(tmp_path / "g")
    write_llava(tmp_path / "l")
    for name in "gl":
        convert(tmp_path / name, tmp_path / f"{name}-new")
        assert_same_weights(weights(tmp_path / name), weights(tmp_path / f"{name}-new"))
        config = config_of(tmp_path / f"{name}-new")
        assert set(config["quantization_config"]) == {"quant_method", "config_for_layers"}
        assert "quantization_config" not in config.get("text_config", {})
        assert verify_folder(tmp_path / f"{name}-new").defects == []
    entry = config_of(tmp_path / "g-new")["quantization_config"]["config_for_layers"]["model.layers.0.self_attn.q_proj"]
    assert entry["bias"] is True and entry["outlier_size"] == 2 and entry["group_num"] == 2


def test_what_cannot_be_converted_leaves_nothing(tmp_path, monkeypatch):
    write_model(tmp_path / "m", "llama", "vptq")
    tiny("llama").save_pretrained(tmp_path / "plain")
    (tmp_path / "there").mkdir()
    listed = sorted(os.listdir(tmp_path))
    for source, out, options, message in [
        ("plain", "new", {}, "is not quantized"),
        ("m", "there", {}, "there exists already"),
        ("m", "new", {"dtype": "int8"}, "dtype int8 is unknown"),
        ("m", "new", {"to": "voroq"}, "cannot be written as voroq"),
    ]:
        with pytest.raises(VoroqError, match=message):
            convert(tmp_path / source, tmp_path / out, **options)
    with monkeypatch.context() as patched, pytest.raises(VoroqError, match="No space left"):
        patched.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        convert(tmp_path / "m", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == listed
    name = "model.layers.1.mlp.up_proj.centroids.weight"
    rewrite(tmp_path / "m", lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(FormatError, match=f"tensor {name} holds NaN"):
        convert(tmp_path / "m", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == listed
    rewrite(tmp_path / "m", lambda tensors: tensors[name].fill_(1e30))
    with pytest.raises(VoroqError, match=r"tensor .* has values that torch.float16 cannot hold"):
        convert(tmp_path / "m", tmp_path / "new", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == listed


def test_rows_too_short_for_the_official_reader_only_become_dense(tmp_path):
    """Three columns of 4 bits are 12 bits a row: other writers make such files, unpacked, where nothing is misread."""
    q, name = random_vptq(8, 3, 1, sizes=(16,), v=2), "model.layers.0.self_attn.q_proj"
    wide = pack(random_vptq(8, 32, 1, sizes=(16,), v=2), torch.float16, "vptq").spec
    old = OldSpec(replace(wide, shape=(8, 3)), True, False)
    (tmp_path / "old").mkdir()
    entries = [Entry.of(f"{name}.{n}", t) for n, t in old.pack(q, torch.float16).items()]
    write_safetensors(tmp_path / "old" / "model.safetensors", entries, {})
    layers = {"quant_method": "vptq", "config_for_layers": {name: old.to_json()}}
    write_json(tmp_path / "old" / "config.json", {"quantization_config": layers})
    with pytest.raises(VoroqError, match=r"groups of 3 columns at 4 bits.* --to dense"):
        convert(tmp_path / "old", tmp_path / "new")
    assert convert(tmp_path / "old", tmp_path / "dense", to="dense").layout == "dense"
    assert torch.equal(weights(tmp_path / "old")[f"{name}.weight"], unpack(pack(q, torch.float16, "voroq")).dequantize())
