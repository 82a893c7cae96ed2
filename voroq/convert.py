"""A quantized folder rewritten: older layouts in the current one, permutations absorbed, other shards, or dense without us.

    the dequantized weight of every linear is the same bit for bit, unless a `dtype` is asked for

Linear by linear and tensor by tensor: the model is never in memory. Everything is written to a folder beside OUT that takes the
name OUT when it is complete.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voroq.errors import FormatError, VoroqError
from voroq.evaluation.models import DTYPES
from voroq.integrations.shapes import open_model_folder
from voroq.packed.base import FLOATS, Packed, Spec
from voroq.packed.checkpoint import Folder, check_listing, quantization_config
from voroq.packed.files import Entry, Written, publish_folder, write_json, write_safetensors
from voroq.packed.format import unpack
from voroq.packed.rewrite import can_absorb, current, current_spec
from voroq.packed.shards import SINGLE, write_index
from voroq.packed.vptq_format import LEAST_ROW, VptqSpec
from voroq.pipeline.output import check_disk, copy_companions
from voroq.report.card import write_converted_card
from voroq.report.inspect import REPORT, read_report

SHARD_BYTES = 5 * 10**9

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Conversion:
    """What was written. `layout` is vptq, voroq or dense; `changed` linears were stored otherwise before, `absorbed` lost a permutation.

    `shards` gives the sha256 of every file of weights.
    """

    path: str
    layout: str
    linears: int
    changed: int
    absorbed: int
    bytes_before: int
    bytes_after: int
    shards: dict[str, str]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    absorb: bool = True,
    shard_bytes: int = SHARD_BYTES,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the quantized model folder `source` to the new folder `out`.

    `to`: "vptq", "dense" (a plain model that opens without voroq), or None for the layout it has. `absorb` permutations where that is
    possible. `dtype`: of everything stored as real numbers; None keeps it, and makes dense weights bfloat16 for a bfloat16 model, else
    what the tables are. `progress(done, of)` is told of shards.

    Raises VoroqError or FormatError for a folder that is damaged or not quantized, and when `out` exists or its disk is too small.
    """
    folder, out = open_model_folder(source), Path(out)
    if folder.specs is None:
        raise VoroqError(f"{source} is not quantized, so there is nothing to convert")
    layout = folder.specs.method if to is None else to
    if layout not in ("dense", folder.specs.method):
        raise VoroqError(f"{source} has the {folder.specs.method} layout, which cannot be written as {layout}; give dense, or leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise VoroqError(f"dtype {dtype} is unknown; choose from {', '.join(DTYPES)}")
    if out.exists() or out.is_symlink():
        raise VoroqError(f"{out} exists already; choose a new folder for OUT")
    sites = folder.sites()
    check_listing(sites, folder.tensors)
    if layout == "dense" and any(spec.activations for spec in sites.values()):
        raise VoroqError(f"{source} rounds the inputs of its linears (activations in its config), which a dense model cannot say")
    if layout != "dense":
        _check_rows(sites)
    plan = _Plan(folder, sites, absorb, DTYPES.get(dtype or ""))
    shards = _shards(list(plan.dense() if layout == "dense" else plan.current()), shard_bytes)
    done = Conversion(
        path=str(out),
        layout=layout,
        linears=len(sites),
        changed=sum(plan.target(spec) != spec for spec in sites.values()) if layout != "dense" else len(sites),
        absorbed=sum(can_absorb(current_spec(spec, absorb=False)) for spec in sites.values()) if absorb and layout != "dense" else 0,
        bytes_before=sum(info.size for info in folder.tensors.values()),
        bytes_after=sum(entry.size for shard in shards for entry in shard),
        shards={},
    )
    try:
        check_disk(out, done.bytes_after)
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise VoroqError(f"cannot write {out}: {error.strerror}; choose another OUT") from error
    try:
        written = _write_shards(made, shards, progress)
        done.shards.update({name: shard.sha256 for name, shard in written.items()})
        checksums = {name: checksum for shard in written.values() for name, checksum in shard.crc32.items()}
        _write_rest(made, folder, plan.config(layout, dtype), done, checksums)
        write_converted_card(made, folder.path, out.name, _changes(done, dtype))
        made.chmod(0o755)
        publish_folder(made, out)
    except OSError as error:
        raise VoroqError(f"cannot write {out}: {error.strerror}; free some space or choose another OUT") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return done


def _check_rows(sites: dict[str, Spec]) -> None:
    """Raises VoroqError for linears whose packed rows the official reader takes for something else (docs/format.md, 2)."""
    for name, spec in sites.items():
        now = current_spec(spec, absorb=False)
        if isinstance(now, VptqSpec) and now.group_size * sum(now.widths) < LEAST_ROW:
            raise VoroqError(
                f"{name} has groups of {now.group_size} columns at {sum(now.widths)} bits; the official vptq reader misreads rows of under "
                f"{LEAST_ROW} bits, so the current layout cannot hold it; write a dense model with --to dense"
            )


class _Plan:
    """What every tensor of a folder becomes: entries whose types and shapes are known, and that load when they are written.

    Tensors come in units (a list each) that one linear's conversion makes, in the order of the source.
    """

    def __init__(self, folder: Folder, sites: dict[str, Spec], absorb: bool, dtype: torch.dtype | None) -> None:
        self.folder = folder
        self.sites = sites
        self.absorb = absorb
        self.dtype = dtype
        self.packed = lru_cache(maxsize=1)(self._packed)
        self.owner = {f"{name}.{stored.name}": name for name, spec in sites.items() for stored in spec.layout()}

    def target(self, spec: Spec) -> Spec:
        return current_spec(spec, absorb=self.absorb)

    def current(self) -> Iterator[list[Entry]]:
        """Linears in the current layout."""
        for name in self._order():
            if name not in self.sites:
                yield [self._verbatim(name)]
                continue
            spec, info = self.sites[name], self.folder.tensors
            types = {stored.name: info[f"{name}.{stored.name}"].dtype for stored in spec.layout() if stored.real}
            yield [
                Entry(f"{name}.{s.name}", (self.dtype or types[s.name]) if s.real else s.dtypes[0], s.shape, self._loader(name, s.name))
                for s in self.target(spec).layout()
            ]

    def dense(self) -> Iterator[list[Entry]]:
        """Linears as plain weights; experts that transformers stacks, stacked."""
        stacks: dict[str, list[str]] = {}
        for name in self.sites:
            match = _EXPERT.fullmatch(name)
            if match and f"{match[1]}.0.gate_up_proj" in self.sites:
                stacks.setdefault(f"{match[1]}.{match[3]}", []).append(name)
        stacked = {name: stack for stack, names in stacks.items() for name in names}
        for name in self._order():
            if name not in self.sites:
                yield [self._verbatim(name)]
            elif name not in stacked:
                yield [Entry(f"{name}.weight", self._dense_type(name), self.sites[name].shape, lambda name=name: self._weight(name))]
            elif name == stacks[stacked[name]][0]:
                yield [self._stack(stacked[name], stacks[stacked[name]])]

    def config(self, layout: str, dtype: str | None) -> dict[str, Any]:
        """The config.json that goes with it."""
        config = {key: value for key, value in self.folder.config.items() if key not in ("quantization_config", "quant_config")}
        for part in [name for name in ("text_config", "llm_config") if isinstance(config.get(name), dict)]:
            config[part] = {key: value for key, value in config[part].items() if key != "quantization_config"}
        if dtype is not None:
            config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
        if layout == "dense":
            return config
        biased = {name for name in self.sites if f"{name}.bias" in self.folder.tensors}
        return config | {"quantization_config": quantization_config(layout, {n: self.target(s) for n, s in self.sites.items()}, biased)}

    def _order(self) -> list[str]:
        """Sites and other tensors as they come in the source; a site where its first tensor is."""
        return list(dict.fromkeys(self.owner.get(name, name) for name in self.folder.tensors))

    def _verbatim(self, name: str) -> Entry:
        info = self.folder.tensors[name]
        dtype = self.dtype if self.dtype is not None and info.dtype in FLOATS else info.dtype
        return Entry(name, dtype, info.shape, lambda: _cast(info.load(), dtype, name))

    def _packed(self, name: str) -> Packed:
        return current(self.folder.packed(name), absorb=self.absorb)

    def _loader(self, name: str, local: str) -> Callable[[], Tensor]:
        def load() -> Tensor:
            tensor = self.packed(name).tensors[local]
            return _cast(tensor, self.dtype, f"{name}.{local}") if self.dtype is not None and tensor.is_floating_point() else tensor

        return load

    def _dense_type(self, name: str) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        parts = [self.folder.config, self.folder.config.get("text_config")]
        if any(isinstance(part, dict) and "bfloat16" in (part.get("dtype"), part.get("torch_dtype")) for part in parts):
            return torch.bfloat16
        reals = [f"{name}.{stored.name}" for stored in self.sites[name].layout() if stored.real]
        return self.folder.tensors[reals[0]].dtype if reals else torch.float32

    def _weight(self, name: str) -> Tensor:
        return _cast(unpack(self.folder.packed(name)).dequantize(), self._dense_type(name), f"{name}.weight")

    def _stack(self, name: str, experts: list[str]) -> Entry:
        numbered = {int(_EXPERT.fullmatch(expert)[2]): expert for expert in experts}
        shapes = {self.sites[expert].shape for expert in experts}
        if sorted(numbered) != list(range(len(experts))) or len(shapes) > 1:
            raise FormatError(f"{self.folder.path}: experts of {name} are missing or differ in shape, so they make no stack")
        shape, dtype = (len(experts), *shapes.pop()), self._dense_type(experts[0])

        def load() -> Tensor:
            stack = torch.empty(shape, dtype=dtype)
            for number, expert in numbered.items():
                stack[number] = self._weight(expert)
            return stack

        return Entry(name, dtype, shape, load)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    short = tensor.to(dtype)
    if not bool(torch.isfinite(short).all()) and bool(torch.isfinite(tensor).all()):
        raise VoroqError(f"tensor {name} has values that {dtype} cannot hold; choose bfloat16 or float32")
    return short


def _shards(units: list[list[Entry]], limit: int) -> list[list[Entry]]:
    """Units in order, as many in a shard as fit; at least one."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for unit in units:
        size = sum(entry.size for entry in unit)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1] += unit
        filled += size
    return shards


def _write_shards(folder: Path, shards: list[list[Entry]], progress: Callable[[int, int], None] | None) -> dict[str, Written]:
    """Shards and index; what was written as each shard, by its name."""
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    written = {}
    for done, (name, entries) in enumerate(zip(names, shards, strict=True), start=1):
        written[name] = write_safetensors(folder / name, entries, {"format": "pt"})
        if progress is not None:
            progress(done, len(names))
    if len(names) > 1:
        weight_map = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
        total = sum(entry.size for entries in shards for entry in entries)
        write_index(folder, weight_map, total)
    return written


def _changes(done: Conversion, dtype: str | None) -> list[str]:
    """What a reader of the card wants to know, in words."""
    rounded = "their weights are the same to the bit" if dtype is None else f"real numbers are rounded to {dtype}"
    if done.layout == "dense":
        return [f"{done.linears} linears are dense", rounded if dtype else "their weights are the quantized ones in the model's type"]
    stored = f"{done.changed} of {done.linears} linears were stored otherwise before"
    return [f"{done.layout} layout", stored, f"{done.absorbed} permutations were absorbed", rounded]


def _write_rest(made: Path, folder: Folder, config: dict[str, Any], done: Conversion, checksums: dict[str, str]) -> None:
    """Tokenizer and the like, config, report."""
    copy_companions(folder.path, made, code=True)
    write_json(made / "config.json", config)
    earlier = read_report(folder.path)
    about = {key: value for key, value in asdict(done).items() if key not in ("path", "shards")}
    losses = [{"name": row.get("name"), "loss": row.get("loss")} for row in earlier.get("sites", []) if isinstance(row, dict)]
    kept = {"method": earlier["method"], "sites": losses} if "method" in earlier and done.layout != "dense" else {}
    write_json(made / REPORT, {**kept, "conversion": about, "shards": done.shards, "tensors": checksums})
