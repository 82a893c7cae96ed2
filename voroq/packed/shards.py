"""What is in a folder's safetensors files, read from their headers alone and checked against the files' sizes.

A header is 8 bytes of length, then JSON: name -> dtype, shape, byte range. A file is refused unless the ranges are as long as
the shapes say, lie end to end, and end where the file ends; so a truncated download is found without reading a tensor.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from voroq.errors import FormatError, VoroqError
from voroq.packed.base import MAX_NAME, is_name
from voroq.packed.files import DTYPES, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100 << 20
_REPAIR = "re-download it, or quantize again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; `size` in bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int

    def load(self) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as shard:
                return shard.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{self.file}: cannot read tensor {self.name} ({error!s:.300}); {_REPAIR}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FormatError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error}); {_REPAIR}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: an object is needed, got {type(value).__name__}; {_REPAIR}")
    return value


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the index's, or the single one. Raises VoroqError when there are none."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise VoroqError(f"{folder} holds neither {SINGLE} nor {INDEX}; a model folder with safetensors weights is needed")
        return [folder / SINGLE]
    files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if not file.exists():
            raise FormatError(f"{file} is missing, though {INDEX} names it; {_REPAIR}")
    return files


def tensors_in(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder by name. Raises FormatError naming the damaged file, or a tensor that the index promises in vain."""
    found: dict[str, TensorInfo] = {}
    for file in shard_files(folder):
        for name, info in read_header(file).items():
            if name in found:
                raise FormatError(f"tensor {name} is in both {found[name].file.name} and {file}; {_REPAIR}")
            found[name] = info
    index = folder / INDEX
    for name, file_name in _weight_map(index).items() if index.exists() else ():
        if name not in found or found[name].file.name != file_name:
            raise FormatError(f"{folder / file_name}: tensor {name} is missing, though {INDEX} names it; {_REPAIR}")
    return found


def read_ahead(files: Iterable[Path]) -> None:
    """Ask the system to read `files` whole, front to back, while we are busy; otherwise tensors come page by page as they are touched."""
    if hasattr(os, "posix_fadvise"):
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises FormatError unless header and file size agree to the byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise FormatError(f"{path} is truncated or no safetensors file; {_REPAIR}")
        header = file.read(length)
    try:
        table = json.loads(header, object_pairs_hook=_once)
        infos = [(_info(name, path, entry), _range(entry)) for name, entry in table.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: damaged safetensors header ({error!r:.80}); {_REPAIR}") from error
    at = 0
    for info, (start, stop) in sorted(infos, key=lambda pair: pair[1]):
        if start != at or stop - start != info.size:
            raise FormatError(f"{path}: tensor {info.name} has bytes {start} to {stop}, {info.size} from {at} are needed; {_REPAIR}")
        at = stop
    if at != size - 8 - length:
        raise FormatError(f"{path} is truncated: its tensors need {at + 8 + length} bytes, it has {size}; {_REPAIR}")
    _check_readable(path)
    return {info.name: info for info, _ in infos}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name occurs twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _range(entry: dict[str, Any]) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    return start, stop


def _check_readable(path: Path) -> None:
    """What the safetensors library itself refuses (it maps the file and reads the header, no tensor)."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: {error!s:.300}; {_REPAIR}") from error


def _info(name: str, path: Path, entry: dict[str, Any]) -> TensorInfo:
    if not is_name(name):
        raise ValueError(f"a name of {len(name)} characters, up to {MAX_NAME} printable ones are needed")
    shape = tuple(entry["shape"])
    if any(type(n) is not int or n < 0 for n in (*shape, *entry["data_offsets"])):
        raise ValueError(f"shape or offsets of {name}")
    dtype = DTYPES[entry["dtype"]]
    return TensorInfo(name, path, dtype, shape, prod(shape) * dtype.itemsize)


def write_index(folder: Path, files: Mapping[str, str], size: int) -> None:
    """The index of a sharded folder: `files` names the file of every tensor, `size` is that of all tensors in bytes."""
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})


def is_shard_name(file: Any) -> bool:
    """Whether an index may name `file`: a safetensors file in the same folder, not one below or outside it."""
    return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map must be an object naming a file for each tensor; {_REPAIR}")
    for file in weight_map.values():
        if not is_shard_name(file):
            raise FormatError(f"{index}: {file!r:.80} is not the name of a safetensors file beside it")
    return weight_map
