"""Everything that can be wrong with a model folder, found without running the model: all of it, not only the first.

Structure (config, headers, index), the model (transformers must find every tensor it wants), values (finite numbers, codes inside
their tables, permutations that are some), and the files' hashes where our own report has them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from voroq.errors import VoroqError
from voroq.integrations.shapes import linear_shapes, model_defects
from voroq.packed.base import Spec
from voroq.packed.checkpoint import Folder, described, listing_defects, value_defects
from voroq.packed.files import crc32_of, sha256_of
from voroq.packed.shards import INDEX, SINGLE, TensorInfo, is_shard_name, read_header, read_json
from voroq.report.inspect import REPORT, read_report


@dataclass(frozen=True)
class Defect:
    """`check` is config, files, hashes, model, structure or values."""

    check: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """`bits_per_weight` of the quantized linears, everything stored counted; None where there are none or it cannot be told.

    `hashed` shards have a sha256 in the folder's own report.
    """

    path: str
    quant_method: str | None
    files: int
    bytes: int
    tensors: int
    linears: int
    bits_per_weight: float | None
    hashed: int
    defects: list[Defect]


def verify_folder(path: str | Path) -> Verification:
    """Raises VoroqError for what is no model folder at all."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise VoroqError(f"{path} has no config.json: give the folder of a model")
    files = _files(path)
    if not files:
        raise VoroqError(f"{path} has no safetensors files: give the folder of a model")
    defects: list[Defect] = []
    tensors = _tensors(path, files, _teller(defects, "files"))
    hashed = _hashes(path, tensors, _teller(defects, "hashes"))
    folder = _folder(path, tensors, _teller(defects, "config"))
    specs = {}
    if folder is not None:
        specs = dict(_specs(folder, _teller(defects, "config")))
        for problem in listing_defects(specs, tensors):
            _teller(defects, "structure")(problem)
        if not any(defect.check in ("config", "files") for defect in defects):
            for problem in model_defects(folder):
                _teller(defects, "model")(problem)
        _values(folder, specs, _teller(defects, "values"))
    stored = [f"{name}.{s.name}" for name, spec in specs.items() for s in spec.layout()]
    whole = bool(specs) and all(name in tensors for name in stored)
    return Verification(
        path=str(path),
        quant_method=None if folder is None or folder.specs is None else folder.specs.method,
        files=len(files),
        bytes=sum(file.stat().st_size for file in files if file.is_file()),
        tensors=len(tensors),
        linears=len(specs),
        bits_per_weight=8 * sum(tensors[n].size for n in stored) / sum(prod(s.shape) for s in specs.values()) if whole else None,
        hashed=hashed,
        defects=list({(d.problem): d for d in reversed(defects)}.values())[::-1],
    )


def _teller(defects: list[Defect], check: str) -> Callable[[str], None]:
    return lambda problem: defects.append(Defect(check, problem))


def _files(path: Path) -> list[Path]:
    """The files of weights: those that are there, and those that the index names."""
    names = {file.name for file in path.glob("*.safetensors")}
    try:
        named = read_json(path / INDEX).get("weight_map") if (path / INDEX).is_file() else {}
    except VoroqError:
        named = {}
    if isinstance(named, dict):
        names |= {name for name in named.values() if is_shard_name(name)}
    return sorted(path / name for name in names)


def _tensors(path: Path, files: list[Path], tell: Callable[[str], None]) -> dict[str, TensorInfo]:
    """All tensors that can be found; headers, index and total size checked."""
    found: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            tell(f"{file} is missing, though {INDEX} names it")
            continue
        try:
            header = read_header(file)
        except VoroqError as error:
            tell(str(error))
            continue
        for name in header.keys() & found.keys():
            tell(f"tensor {name} is in both {found[name].file.name} and {file.name}")
        found |= header
    if (path / INDEX).is_file():
        _check_index(path, found, tell)
    elif [file.name for file in files] != [SINGLE]:
        tell(f"{path} has no {INDEX}, which more files than {SINGLE} need")
    return found


def _check_index(path: Path, found: dict[str, TensorInfo], tell: Callable[[str], None]) -> None:
    try:
        index = read_json(path / INDEX)
    except VoroqError as error:
        tell(str(error))
        return
    named = index.get("weight_map")
    if not isinstance(named, dict):
        tell(f"{path / INDEX}: weight_map must be an object naming a file for each tensor")
        return
    for file in dict.fromkeys(map(repr, (file for file in named.values() if not is_shard_name(file)))):
        tell(f"{INDEX} names {file:.80}, which is no safetensors file beside it; move it here, files elsewhere are not read")
    for name, file in named.items():
        if is_shard_name(file) and (name not in found or found[name].file.name != file):
            tell(f"tensor {name} is not in {file!r:.80}, though {INDEX} says so")
    for name in found.keys() - named.keys():
        tell(f"tensor {name} of {found[name].file.name} is not in {INDEX}, so loaders do not see it")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(info.size for info in found.values())
    if total is not None and total != size:
        tell(f"{INDEX} says that the tensors have {total} bytes, they have {size}")


def _hashes(path: Path, tensors: dict[str, TensorInfo], tell: Callable[[str], None]) -> int:
    """How many shards our report gives a hash for."""
    try:
        report = read_report(path)
    except VoroqError as error:
        tell(str(error))
        return 0
    shards = report.get("shards", {})
    if not isinstance(shards, dict):
        tell(f"{path / REPORT}: shards must be an object naming a hash for each file")
        return 0
    checksums = report.get("tensors", {})
    for name, digest in shards.items():
        if Path(name).name != name or not (path / name).is_file():
            tell(f"{name} is missing, though {REPORT} names it")
        elif sha256_of(path / name) != digest:
            inside = [info for info in tensors.values() if info.file == path / name]
            tell(f"{name} is not the file that was written: its sha256 differs from {REPORT}{_changed(inside, checksums)}")
    return len(shards)


def _changed(infos: list[TensorInfo], checksums: Any) -> str:
    """Which of the tensors of a changed file are not what was written, where the report has their checksums."""
    if not isinstance(checksums, dict) or not checksums or not infos:
        return ""
    names = [info.name for info in infos if info.name not in checksums or _crc32(info) != checksums[info.name]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"; changed: {', '.join(names[:3])}{more}" if names else "; its tensors are as they were"


def _crc32(info: TensorInfo) -> str | None:
    """None for a tensor that cannot be read, which is a defect of its own."""
    try:
        return crc32_of(info.load())
    except VoroqError:
        return None


def _folder(path: Path, tensors: dict[str, TensorInfo], tell: Callable[[str], None]) -> Folder | None:
    try:
        return described(path, read_json(path / "config.json"), tensors)
    except VoroqError as error:
        tell(str(error))
        return None


def _specs(folder: Folder, tell: Callable[[str], None]) -> Iterator[tuple[str, Spec]]:
    """The specs of all linears that have one."""
    for problem in folder.uncovered():
        tell(problem)
    for name in folder.names():
        try:
            if folder.specs.lacks_shape(name) and name not in folder.shapes:
                folder = replace(folder, shapes=linear_shapes(folder, [n for n in folder.names() if folder.specs.lacks_shape(n)]))
            yield name, folder.spec(name)
        except VoroqError as error:
            tell(str(error))


def _values(folder: Folder, specs: dict[str, Spec], tell: Callable[[str], None]) -> None:
    """Every tensor read once, one at a time."""
    stored = {f"{name}.{s.name}": s for name, spec in specs.items() for s in spec.layout()}
    for name, info in folder.tensors.items():
        try:
            tensor = info.load()
        except VoroqError as error:
            tell(str(error))
            continue
        if name in stored:
            own = stored[name]
            if tensor.dtype in own.dtypes and tuple(tensor.shape) == own.shape:  # else a defect of structure, told already
                for problem in value_defects(f"tensor {name}", own, tensor):
                    tell(problem)
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            tell(f"{info.file}: tensor {name} holds NaN or infinity")


def verification_view(found: Verification) -> Group:
    """One table: what was looked at, then what is wrong."""
    table = Table("check", "result", title=Text(found.path), title_justify="left")
    bits = "" if found.bits_per_weight is None else f", {found.bits_per_weight:.3f} bits per weight"
    table.add_row("size", f"{found.bytes / 1e6:.2f} MB in {found.files} files, {found.tensors} tensors")
    table.add_row("linears", f"{found.linears} quantized ({found.quant_method or 'none'}){bits}")
    table.add_row("hashes", f"{found.hashed} of {found.files} files have one in {REPORT}")
    for defect in found.defects:
        table.add_row(Text(defect.check, style="red"), Text(defect.problem))
    return Group(table, Text("good" if not found.defects else f"{len(found.defects)} defects"))
