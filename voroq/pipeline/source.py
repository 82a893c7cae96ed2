"""Where the weights come from: a folder of safetensors shards, read one tensor at a time.

`open_source` reads headers only. Everything in the folder is treated as hostile: shard names must be plain file names, every
shard must be complete, and nothing but safetensors is ever opened (a pickle can run code).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from voroq.errors import FormatError, VoroqError
from voroq.packed.hub import locate

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: `size` bytes from byte `start` of `file`."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Source:
    """A model on disk. `name` is what the user gave; `tensors` are in source order (files by name, then by offset)."""

    name: str
    folder: Path
    revision: str | None
    trust_remote_code: bool
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, Entry] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors.values())

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, in its own memory (never a mapping of the file, which would count as ours and stay)."""
        entry = self.tensors[name]
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = torch.empty(entry.size, dtype=torch.uint8)
        with open(self.folder / entry.file, "rb") as file:
            file.seek(entry.start)
            if file.readinto(memoryview(data.numpy())) != entry.size:
                raise FormatError(f"{self.folder / entry.file} ends inside tensor {name}; the file changed or was truncated, get it again")
        return data.view(entry.dtype).reshape(entry.shape)

    def files(self) -> list[str]:
        """Names of the shards, sorted."""
        return sorted({entry.file for entry in self.tensors.values()})

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run compares: content hash of the config; per shard its size, header hash and a hash of samples.

        The samples (a few KiB spread over each file) tell apart two trainings of one architecture without reading everything.
        """
        return {
            "config": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
            "files": {name: _file_fingerprint(self.folder / name) for name in self.files()},
        }


def open_source(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """The model in a local folder, or on the hub by its id (downloads config, tokenizer and safetensors only).

    Raises VoroqError if there is no such model, it is gated, it cannot be reached, or it has no safetensors; FormatError if a
    shard or the index is missing, corrupted or truncated.
    """
    folder = locate(model, revision=revision, trust_remote_code=trust_remote_code)
    config = _read_json(folder / "config.json", f"{model} has no config.json, so it is not a transformers model folder")
    tensors: dict[str, Entry] = {}
    for file in _shards(folder):
        for name, entry in _entries(folder, file):
            if name in tensors:
                raise FormatError(f"tensor {name} is in both {tensors[name].file} and {file}; keep one of them")
            tensors[name] = entry
    _check_index(folder, tensors)
    return Source(str(model), folder, revision, trust_remote_code, config, tensors)


def _read_json(path: Path, absent: str) -> dict[str, Any]:
    if not path.is_file():
        raise VoroqError(absent)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}); get it again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, not an object; get it again")
    return value


def _shards(folder: Path) -> list[str]:
    """Names of the files to read, sorted."""
    if (folder / INDEX).is_file():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if not (folder / name).is_file():
                raise VoroqError(f"{folder / INDEX} names the shard {name}, which is not there; get the missing file")
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise VoroqError(f"{folder} has only pickled weights ({pickles[0]}), which can run code; convert them to safetensors first")
    raise VoroqError(f"{folder} has no {SINGLE} and no {INDEX}; give a folder with safetensors weights")


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = _read_json(path, f"{path} is missing").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map from tensors to files; get it again")
    for name in weight_map.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not any(mark in name for mark in "/\\:\0")
        if not plain or name.startswith("."):
            raise FormatError(f"{path} names a shard {name!r}; shards must be plain *.safetensors names in the same folder")
    return weight_map


def _check_index(folder: Path, tensors: dict[str, Entry]) -> None:
    if not (folder / INDEX).is_file():
        return
    for name, file in _weight_map(folder).items():
        if name not in tensors or tensors[name].file != file:
            raise FormatError(f"{folder / INDEX} places tensor {name} in {file}, where it is not; index and shards do not belong together")


def _entries(folder: Path, file: str) -> Iterator[tuple[str, Entry]]:
    """The tensors of one shard by offset. safetensors validates the file: header, offsets without gap or overlap, full length."""
    path = folder / file
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is corrupted or truncated ({error}); get the file again") from error
    header, length = _header(path)
    header.pop("__metadata__", None)
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        if item["dtype"] not in _DTYPES:
            raise FormatError(
                f"tensor {name} in {path} has the unsupported dtype {item['dtype']}; give a model in float16, bfloat16 or float32"
            )
        start, stop = item["data_offsets"]
        yield name, Entry(file, _DTYPES[item["dtype"]], tuple(item["shape"]), 8 + length + start, stop - start)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), length


def _file_fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = hashlib.sha256(file.read(length)).hexdigest()
        samples = hashlib.sha256()
        for part in range(_SAMPLES):
            file.seek(8 + length + part * max(size - 8 - length - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            samples.update(file.read(_SAMPLE_BYTES))
    return {"size": size, "header": header, "samples": samples.hexdigest()}
