import json

import pytest
import torch

from voroq.errors import FormatError, VoroqError
from voroq.packed import checkpoint
from voroq.packed.base import Packed
from voroq.packed.checkpoint import check_listing, check_packed, open_folder, quantization_config, read_packed, specs_from_config
from voroq.packed.conftest import assert_same, random_gptq, random_vptq, rewrite, write_folder
from voroq.packed.files import write_json
from voroq.packed.format import bits_per_weight, pack, total_bytes, unpack
from voroq.packed.shards import read_header
from voroq.quantized import narrow

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def linears(layout: str):
    if layout == "vptq":
        return {name: random_vptq(8, 20, i, groups=2, outliers=(4, 2, 8), steps=("affine", "permute")) for i, name in enumerate(NAMES)}
    return {name: random_gptq(8, 20, i) for i, name in enumerate(NAMES)}


@pytest.fixture(params=["vptq", "voroq"])
def layout(request):
    return request.param


def test_a_folder_gives_back_what_was_written(tmp_path, layout):
    made = linears(layout)
    packed = write_folder(tmp_path, made, layout)
    folder = open_folder(tmp_path)
    assert set(folder.sites()) == set(NAMES)
    for name, q in made.items():
        assert_same(unpack(read_packed(tmp_path, name)), narrow(q, torch.bfloat16))
        spec = folder.sites()[name]
        assert folder.stored_bytes(name, spec) == total_bytes(packed[name]) == bits_per_weight(packed[name]) * 160 / 8


def test_a_plain_folder_has_no_sites_and_one_that_lost_its_config_is_none(tmp_path, layout):
    write_folder(tmp_path, linears(layout), layout)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(FormatError, match=rf"{NAMES[0]} is stored quantized .*has no quantization_config"):
        open_folder(tmp_path)
    mark = {"vptq": "centroids.weight", "voroq": "weight_codes"}[layout]
    rewrite(tmp_path, lambda tensors: [tensors.pop(f"{name}.{mark}") for name in NAMES])
    assert open_folder(tmp_path).sites() == {} and len(open_folder(tmp_path).tensors) > 4


def test_a_quantization_config_is_found_wherever_it_lies_and_moved_where_transformers_looks():
    ours, first = {"quant_method": "vptq", "config_for_layers": {"a.q": {"vector_lens": [-1, 4]}}}, {"a.q": {"vector_lens": [-1, 4]}}
    nested, none = {"llm_config": {"quantization_config": ours}}, {"quantization_config": None}
    for config in (nested, {"quant_config": first}, none | {"quant_config": first}):
        moved = checkpoint.with_quantization_config({"x": 1} | config)
        assert checkpoint.quantization_of(config) == moved["quantization_config"] == ours
        assert "quant_config" not in moved and moved["x"] == 1
        assert checkpoint.with_quantization_config(moved) is moved
    for config in ({"quantization_config": ours, "quant_config": first}, {"text_config": {"quantization_config": ours}}):
        assert checkpoint.quantization_of(config) == ours and checkpoint.with_quantization_config(config) is config
    theirs = [{"bits": 4}, "int8", {"a": {"bits": 4}}, {"a": 3}, [first], None, {}]
    for config in ({}, *({"quant_config": value} for value in theirs)):
        assert checkpoint.quantization_of(config) is None and checkpoint.with_quantization_config(config) is config
    for method in ("awq", [], None):
        other = {"llm_config": {"quantization_config": {"quant_method": method}}}
        assert checkpoint.with_quantization_config(other) is other


def test_full_names_come_before_shared_tails():
    entry = pack(linears("vptq")[NAMES[0]], torch.bfloat16, "vptq").spec.to_json()
    other = pack(random_vptq(8, 20, 0), torch.bfloat16, "vptq").spec.to_json()
    config = {"quant_method": "vptq", "config_for_layers": {"a.q_proj": other}, "shared_layer_config": {"q_proj": entry}}
    table = specs_from_config(config | {"modules_to_not_convert": ["vision"]})
    assert table.lookup("a.q_proj").outliers is None
    assert table.lookup("b.q_proj").outliers.columns == 4
    assert table.lookup("q_proj.b") is None
    assert table.lookup("vision.b.q_proj") is None
    short = {key: value for key, value in entry.items() if key not in ("in_features", "out_features")}
    table = specs_from_config({"quant_method": "vptq", "shared_layer_config": {"q_proj": short}})
    assert table.lookup("b.q_proj", (8, 20)).shape == (8, 20)
    with pytest.raises(FormatError, match="group_size"):
        table.lookup("b.q_proj", (8, 24))


def test_sites_of_shared_entries_are_found_by_their_tensors(tmp_path):
    packed = write_folder(tmp_path, linears("vptq"), "vptq")
    shared = {name.rsplit(".", 1)[1]: p.spec.to_json() for name, p in packed.items()}
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "vptq", "shared_layer_config": shared}})
    assert open_folder(tmp_path).sites() == {name: p.spec for name, p in packed.items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be one of vptq, voroq"),
        ({"quant_method": "vptq"}, "config_for_layers"),
        ({"quant_method": "vptq", "config_for_layers": {"a": 3}}, "config of a: an object is needed"),
        ({"quant_method": "vptq", "config_for_layers": {"a": {}}, "to_dict": 1}, "unknown field 'to_dict'"),
        ({"quant_method": "vptq", "config_for_layers": {"a": {}}, "enable_proxy_error": True}, "enable_proxy_error"),
        ({"quant_method": "voroq", "version": 2, "layers": {}}, "version must be an integer from 1 to 1"),
        ({"quant_method": "voroq", "version": 1, "layers": []}, "layers"),
        ([], "an object is needed"),
    ],
)
def test_a_damaged_quantization_config_is_refused(config, message):
    with pytest.raises(FormatError, match=message):
        specs_from_config(config)


def damage(tensors, name, change):
    tensors[name] = change(tensors[name])


NAN = float("nan")
VPTQ_DAMAGE = {
    "outlier_indices": (lambda t: t.fill_(8), "holds code 8, its table has 8 entries"),
    "perm": (lambda t: t.fill_(3), "is not a permutation of 0 to 19"),
    "centroids.weight": (lambda t: t.index_fill_(1, torch.tensor([1]), NAN), "holds NaN"),
    "weight_scale": (lambda t: t.fill_(float("inf")), "holds NaN or infinity"),
    "indices": (lambda t: t.float(), "is float32, int32 is needed"),
    "weight_bias": (lambda t: t[:-1], r"has shape \[19\], \[20\] is needed"),
}
NATIVE_DAMAGE = {
    "weight_perm": (lambda t: t.add_(1), "is not a permutation"),
    "weight_scales": (lambda t: t.fill_(NAN), "holds NaN"),
    "weight_zeros_1": (lambda t: t.to(torch.int64), "is int64, int32 is needed"),
    "weight_codes": (lambda t: t[:-1], r"has shape \[7, 2\], \[8, 2\] is needed"),
}


@pytest.mark.parametrize(("layout", "tensor"), [*(("vptq", n) for n in VPTQ_DAMAGE), *(("voroq", n) for n in NATIVE_DAMAGE)])
def test_a_damaged_tensor_is_named(tmp_path, layout, tensor):
    change, message = (VPTQ_DAMAGE if layout == "vptq" else NATIVE_DAMAGE)[tensor]
    write_folder(tmp_path, linears(layout), layout)
    rewrite(tmp_path, lambda tensors: damage(tensors, f"{NAMES[0]}.{tensor}", change))
    read_packed(tmp_path, NAMES[1])
    with pytest.raises(FormatError, match=f"tensor {NAMES[0]}.{tensor} {message}"):
        read_packed(tmp_path, NAMES[0])


def test_missing_and_leftover_tensors_are_named(tmp_path, layout):
    write_folder(tmp_path, linears(layout), layout)
    first = next(iter(open_folder(tmp_path).sites()[NAMES[0]].layout())).name
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{NAMES[0]}.{first}"))
    with pytest.raises(FormatError, match=f"tensor {NAMES[0]}.{first} is missing"):
        read_packed(tmp_path, NAMES[0])
    write_folder(tmp_path, linears(layout), layout)
    rewrite(tmp_path, lambda tensors: tensors.update({f"{NAMES[0]}.weight": torch.ones(8, 20)}))
    with pytest.raises(FormatError, match=f"tensor {NAMES[0]}.weight does not belong"):
        read_packed(tmp_path, NAMES[0])


def test_a_bias_belongs_only_to_a_linear_that_has_one(tmp_path, layout):
    write_folder(tmp_path, linears(layout), layout)
    rewrite(tmp_path, lambda tensors: tensors.update({f"{NAMES[0]}.bias": torch.ones(8)}))
    folder = open_folder(tmp_path)
    check_listing(folder.sites(), folder.tensors)
    check_listing(folder.sites(), folder.tensors, {NAMES[0]})
    with pytest.raises(FormatError, match=r"q_proj.bias does not belong"):
        check_listing(folder.sites(), folder.tensors, set())
    with pytest.raises(FormatError, match=r"down_proj.bias is missing"):
        check_listing(folder.sites(), folder.tensors, set(NAMES))


def test_check_packed_wants_exactly_the_tensors_of_the_layout(layout):
    packed = pack(linears(layout)[NAMES[0]], torch.bfloat16, layout)
    check_packed("m", packed)
    with pytest.raises(FormatError, match=r"tensor m.extra is unexpected"):
        check_packed("m", Packed(packed.spec, {**packed.tensors, "extra": torch.ones(1)}))
    with pytest.raises(FormatError, match="is missing"):
        check_packed("m", Packed(packed.spec, dict(list(packed.tensors.items())[1:])))


def test_a_truncated_or_damaged_shard_is_named(tmp_path, layout):
    write_folder(tmp_path, linears(layout), layout)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for data, message in [
        (whole[:-1], "is truncated: its tensors need"),
        (whole + b"\0", "its tensors need"),
        (whole[:20], "is truncated or no safetensors"),
        (whole[:4], "is truncated or no safetensors"),
        (b"\xff" * 8 + whole[8:], "is truncated or no safetensors"),
        (whole.replace(b'"shape":[', b'"shapo":[', 1), "damaged safetensors header"),
        (whole.replace(b'"I32"', b'"I99"', 1), "damaged safetensors header"),
    ]:
        file.write_bytes(data)
        with pytest.raises(FormatError, match=f"{file}.*{message}"):
            open_folder(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path):
    write_folder(tmp_path, linears("vptq"), "vptq")
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(FormatError, match=r"has bytes 0 to .* are needed"):
        read_header(file)


def test_an_index_must_agree_with_its_shards(tmp_path, layout):
    write_folder(tmp_path, linears(layout), layout)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(VoroqError, match="holds neither"):
        open_folder(tmp_path)
    shard = "model-00001-of-00001.safetensors"
    names = read_header(tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in [
        (dict.fromkeys([*names, "extra"], shard), "tensor extra is missing"),
        (dict.fromkeys(names, "gone.safetensors"), "gone.safetensors is missing"),
        (dict.fromkeys(names, "../model.safetensors"), "not the name of a safetensors file beside it"),
        ({}, "weight_map must be"),
    ]:
        write_json(index, {"weight_map": weight_map})
        with pytest.raises(FormatError, match=message):
            open_folder(tmp_path)
    write_json(index, {"weight_map": dict.fromkeys(names, shard)})
    assert set(open_folder(tmp_path).sites()) == set(NAMES)


def test_configs_are_written_for_their_layout():
    vptq, native = (pack(linears(layout)[NAMES[0]], torch.bfloat16, layout).spec for layout in ("vptq", "voroq"))
    config = quantization_config("vptq", {"a": vptq}, biased={"a"})
    assert set(config) == {"quant_method", "config_for_layers"} and config["config_for_layers"]["a"]["bias"] is True
    config = quantization_config("voroq", {"a": native})
    assert set(config) == {"quant_method", "version", "layers"}
    assert specs_from_config(json.loads(json.dumps(config))).lookup("a") == native


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_among_many_is_found(dtype, value):
    for at in (0, 517, 1023):
        table = torch.randn(1024).to(dtype)
        assert checkpoint._all_finite(table)
        table[at] = value
        assert not checkpoint._all_finite(table)


def test_permutations_and_what_is_none():
    assert checkpoint._is_permutation(torch.randperm(999))
    for order in ([0, 0], [1, 2], [-1, 0], [0, 2, 2], [2**40, 0]):
        assert not checkpoint._is_permutation(torch.tensor(order))
