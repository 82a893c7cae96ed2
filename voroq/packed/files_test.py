import hashlib
import json
import os
import zlib

import pytest
import torch
from safetensors.torch import load_file

from voroq.packed.files import Entry, crc32_of, sha256_of, write_json, write_safetensors, write_text

TENSORS = {
    "odd": torch.arange(5, dtype=torch.int16),
    "half": torch.arange(3, dtype=torch.bfloat16),
    "wide": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "bytes": torch.arange(3, dtype=torch.uint8),
}


def entries(tensors=TENSORS):
    return [Entry.of(name, tensor) for name, tensor in tensors.items()]


def test_the_safetensors_package_reads_back_what_was_written(tmp_path):
    written = write_safetensors(tmp_path / "m.safetensors", entries(), {"format": "pt"})
    assert written.sha256 == sha256_of(tmp_path / "m.safetensors") == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert written.crc32[name] == crc32_of(found[name]) == f"{zlib.crc32(bytes(tensor.reshape(-1).view(torch.uint8).tolist())):08x}"
    assert written.crc32.keys() == TENSORS.keys()


def test_the_same_entries_give_the_same_bytes(tmp_path):
    assert write_safetensors(tmp_path / "a", entries(), {"k": "v"}) == write_safetensors(tmp_path / "b", entries(), {"k": "v"})
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_only_one_tensor_is_loaded_at_a_time(tmp_path):
    alive: list[str] = []

    def loader(name):
        def load():
            assert not alive, f"{alive} still alive while {name} loads"
            tensor = torch.ones(1000)
            alive.append(name)
            finalizers.append(__import__("weakref").finalize(tensor, alive.remove, name))
            return tensor

        return load

    finalizers: list = []
    write_safetensors(tmp_path / "m", [Entry(str(i), torch.float32, (1000,), loader(str(i))) for i in range(4)], {})
    assert len(finalizers) == 4 and not alive


def test_every_tensor_is_aligned_to_its_element_size(tmp_path):
    write_safetensors(tmp_path / "m", entries(), {"format": "pt"})
    data = (tmp_path / "m").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0, name


@pytest.mark.parametrize("at", ["load", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch, at):
    path = tmp_path / "m.safetensors"
    before = write_safetensors(path, entries(), {})

    def fail(*args):
        raise OSError("disk full")

    broken = entries()
    if at == "load":
        broken[2] = Entry("wide", torch.int64, (2, 3), fail)
    else:
        monkeypatch.setattr(os, at, fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, broken, {"other": "metadata"})
    monkeypatch.undo()
    assert sha256_of(path) == before.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match="announced as"):
        write_safetensors(tmp_path / "m", [Entry("a", torch.float32, (3,), lambda: torch.ones(4))], {})
    with pytest.raises(ValueError, match="given twice"):
        write_safetensors(tmp_path / "m", entries() + entries(), {})
    with pytest.raises(ValueError, match="cannot hold"):
        write_safetensors(tmp_path / "m", [Entry.of("c", torch.ones(1, dtype=torch.complex64))], {})


def test_text_and_json_are_written_whole(tmp_path):
    digest = write_json(tmp_path / "c.json", {"b": 1, "a": "é"})
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == {"b": 1, "a": "é"}
    assert digest == sha256_of(tmp_path / "c.json")
    assert write_text(tmp_path / "t", "x") == sha256_of(tmp_path / "t")
