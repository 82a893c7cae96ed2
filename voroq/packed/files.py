"""Writing files so that a reader never sees half of one.

Every write goes to a temporary name in the same folder, is flushed to the disk, and takes its final name in one step
(`os.replace`); then the folder itself is flushed. After a kill or a power cut there is the old file or the new one.

`write_safetensors` streams: a file of any size needs the memory of its largest tensor.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
"""Element types of safetensors by their name in the header."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor to write: what it will be, known before it is loaded, and how to load it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(name: str, tensor: Tensor) -> "Entry":
        return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


@dataclass(frozen=True)
class Written:
    """A file's sha256, and the crc32 of the bytes of every tensor in it (eight hexadecimal digits) by its name."""

    sha256: str
    crc32: dict[str, str]


def write_safetensors(path: str | Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> Written:
    """Write `entries` to `path`. Only one loaded tensor is alive at a time.

    Tensors lie in the file by falling element size, then in the given order, so that each is aligned; the same entries give
    the same bytes. Raises ValueError for a name given twice, a dtype the format lacks, or a tensor that is not as announced.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    digest, checksums = hashlib.sha256(), {}
    with _replacing(Path(path)) as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(_header(ordered, metadata))
        for entry in ordered:
            data = _bytes_of(entry)
            checksums[entry.name] = _crc32(data)
            put(data)
    return Written(digest.hexdigest(), checksums)


def write_text(path: str | Path, text: str) -> str:
    """Write `text` as UTF-8 and return the file's sha256."""
    data = text.encode()
    with _replacing(Path(path)) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: str | Path, value: Any) -> str:
    """Write `value` as indented JSON, keys in the given order, and return the file's sha256."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish_folder(made: Path, final: Path) -> None:
    """Give a finished folder its name. Raises OSError if something that is not an empty folder has it already."""
    os.replace(made, final)
    _sync_folder(final.parent)


def sha256_of(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32_of(tensor: Tensor) -> str:
    """As in `Written`."""
    return _crc32(_raw(tensor))


def _crc32(data: memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that becomes `path` when the block ends well, and is removed otherwise."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Windows cannot open folders and does without."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        if entry.dtype not in _NAMES:
            raise ValueError(f"tensor {entry.name}: safetensors files cannot hold {entry.dtype}")
        if entry.name in table:
            raise ValueError(f"tensor {entry.name} is given twice")
        table[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.size]}
        at += entry.size
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _bytes_of(entry: Entry) -> memoryview:
    tensor = entry.load().detach()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"tensor {entry.name}: announced as {entry.dtype} {list(entry.shape)}, got {got}")
    return _raw(tensor)


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
