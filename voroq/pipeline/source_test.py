"""A source is read lazily, and everything wrong with it is said by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from voroq.errors import FormatError, VoroqError
from voroq.pipeline.source import INDEX, open_source
from voroq.pipeline.tiny_models_test import save_tiny


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_tiny("Llama", tmp_path, shards="20KB")
    return tmp_path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_tensors_are_read_as_stored(sharded):
    source = open_source(sharded)
    stored = {name: tensor for path in shards(sharded) for name, tensor in load_file(path).items()}
    assert len(shards(sharded)) > 2
    assert set(source.tensors) == set(stored)
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in stored.items())
    assert source.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert source.files() == [path.name for path in shards(sharded)]
    assert source.config["model_type"] == "llama"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool])
def test_every_dtype_is_read_back(dtype, tmp_path):
    save_tiny("Llama", tmp_path)
    stored = {"a": torch.arange(-6, 6).reshape(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype), "empty": torch.zeros(0, 4).to(dtype)}
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    for name, tensor in stored.items():
        read = source.tensor(name)
        assert read.dtype == dtype and read.shape == tensor.shape
        assert torch.equal(read.double(), tensor.double())


def test_order_is_that_of_the_files(sharded):
    places = [(entry.file, entry.start) for entry in open_source(sharded).tensors.values()]
    assert places == sorted(places)


def test_fingerprint_sees_headers_weights_and_config(sharded):
    before = open_source(sharded).fingerprint()
    assert json.loads(json.dumps(before)) == before == open_source(sharded).fingerprint()
    stored = load_file(shards(sharded)[0])
    save_file({name: tensor + 1 for name, tensor in stored.items()}, shards(sharded)[0], metadata={"format": "pt"})
    after = open_source(sharded).fingerprint()
    name = shards(sharded)[0].name
    assert before["files"][name]["header"] == after["files"][name]["header"]
    assert [key for key in before["files"] if before["files"][key] != after["files"][key]] == [name]
    assert before["config"] == after["config"]


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(keep, sharded):
    shard = shards(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(FormatError, match=f"{shard.name} is corrupted or truncated"):
        open_source(sharded)


def test_a_corrupted_header_is_named(sharded):
    shard = shards(sharded)[0]
    data = bytearray(shard.read_bytes())
    data[12] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(FormatError, match=shard.name):
        open_source(sharded)


def test_a_file_that_shrinks_while_open_is_named(sharded):
    source = open_source(sharded)
    shard = shards(sharded)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        [source.tensor(name) for name in source.tensors]


def test_a_missing_shard_is_named(sharded):
    shards(sharded)[1].unlink()
    with pytest.raises(VoroqError, match="model-00002-of"):
        open_source(sharded)


BAD_NAMES = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\m.safetensors", ".x.safetensors", "m.bin", 3, None]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_index_cannot_lead_out_of_the_folder(name, sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match="plain"):
        open_source(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_a_broken_index_is_named(text, sharded):
    (sharded / INDEX).write_text(text)
    with pytest.raises(FormatError, match=r"index\.json"):
        open_source(sharded)


def test_an_index_of_other_shards_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = shards(sharded)[0].name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"model\.ghost\.weight"):
        open_source(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = shards(sharded)[:2]
    stored = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**stored, name: tensor}, second)
    with pytest.raises(FormatError, match=f"tensor {name} is in both"):
        open_source(sharded)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(VoroqError, match=r"pickled weights \(pytorch_model\.bin\)"):
        open_source(tmp_path)


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(VoroqError, match=r"no config\.json"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VoroqError, match=r"no model\.safetensors"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{'not json'}")
    with pytest.raises(FormatError, match="not JSON"):
        open_source(tmp_path)


def test_a_file_is_not_a_model(sharded):
    with pytest.raises(VoroqError, match="is a file"):
        open_source(shards(sharded)[0])
