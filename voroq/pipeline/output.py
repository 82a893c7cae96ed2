"""The output folder of a run: what is done, what is not, and how it becomes an ordinary Hugging Face folder.

    voroq_run/settings.json      the fingerprint of the run; the folder exists while the run is unfinished
    voroq_run/tuning.safetensors the state of the tuning, and tuned.safetensors its result, where there is one
    voroq_run/own-text-*.jsonl, channels-*   what was made of the original for the run (`prelude.py`)
    voroq_run/block-00003.json   block 3 is done: its shard, the shard's sha256, specs and report rows of its sites
    model-00001-of-00007.safetensors   everything outside the blocks; 00002... one shard per block

Every file is written under a temporary name and renamed. A block counts as done if its journal entry exists and its shard hashes to
what the entry says, so a kill at any moment loses at most the block at hand. config.json comes after all shards, the report last.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from voroq.errors import VoroqError
from voroq.packed.base import Packed, Spec
from voroq.packed.checkpoint import quantization_config
from voroq.packed.files import Entry, sha256_of, write_json, write_safetensors
from voroq.packed.shards import read_header, write_index
from voroq.pipeline.source import Source

REPORT = "voroq_report.json"
JOURNAL = "voroq_run"
TUNED = "tuned.safetensors"
COMPANIONS = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "*.model",
              "chat_template*", "spiece*", "LICENSE*", "NOTICE*", "USE_POLICY*")  # fmt: skip
"""Files that are copied from the original as they are."""


class Output:
    """One run's folder. Raises VoroqError from the start where `folder` cannot be what the run needs."""

    def __init__(self, folder: Path, blocks: int, settings: dict[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.blocks = blocks
        self.settings = settings
        check_claim(folder, resume=resume)
        self.report = self._finished()
        if self.report is None:
            self._claim()

    def _finished(self) -> dict[str, Any] | None:
        """The report of the finished run in the folder, if it is this run."""
        path = self.folder / REPORT
        if not path.is_file():
            return None
        report = _read(path)
        self._compare(path, report and report.get("settings"))
        for name, digest in report.get("shards", {}).items():
            if not (self.folder / name).is_file() or sha256_of(self.folder / name) != digest:
                raise VoroqError(f"{self.folder / name} was changed after the run; delete the folder and quantize again")
        # The report is the last file to appear: with it the run is finished, even if a kill left some of the journal behind.
        shutil.rmtree(self.folder / JOURNAL, ignore_errors=True)
        return report

    def _claim(self) -> None:
        journal = self.folder / JOURNAL / "settings.json"
        if journal.is_file():
            self._compare(journal, _read(journal))
            return
        try:
            (self.folder / JOURNAL).mkdir(parents=True, exist_ok=True)
            write_json(journal, self.settings)
        except OSError as error:
            raise VoroqError(f"cannot write to {self.folder}: {error.strerror}; choose another OUT") from error

    def _compare(self, path: Path, earlier: Any) -> None:
        if not isinstance(earlier, dict):
            raise VoroqError(f"{path} is damaged, so the run cannot be resumed; choose another OUT, or delete the folder")
        found = _difference(earlier, self.settings)
        if found is not None:
            key, was, now = found
            raise VoroqError(
                f"cannot resume {self.folder}: {key} was {was} when the run was started and is {now} now; "
                f"give the same settings, or choose another OUT"
            )

    # ---- shards -----------------------------------------------------------------------------------------------------

    def shard(self, index: int | None) -> Path:
        """The shard of block `index`, or the one of everything else for None."""
        number = 1 if index is None else index + 2
        return self.folder / f"model-{number:05d}-of-{self.blocks + 1:05d}.safetensors"

    def entry(self, index: int | None) -> dict[str, Any] | None:
        """The journal's entry of a block whose shard is whole, else None."""
        path = self._entry_path(index)
        if not path.is_file() or not self.shard(index).is_file():
            return None
        entry, staged = _read(path), self._staged(index)
        if entry and staged.is_file() and sha256_of(staged) == entry.get("sha256"):
            os.replace(staged, self.shard(index))
        return entry if entry and sha256_of(self.shard(index)) == entry.get("sha256") else None

    def write(
        self, index: int | None, source: Source, verbatim: Sequence[str], sites: Mapping[str, Packed], body: dict[str, Any]
    ) -> dict[str, Any]:
        """Write a shard, `verbatim` tensors copied from `source` and the sites' packed ones, then its journal entry; return that."""
        entries = [copied(source, name) for name in verbatim]
        for site, packed in sites.items():
            entries += [Entry.of(f"{site}.{name}", tensor.contiguous()) for name, tensor in packed.tensors.items()]
        try:
            written = write_safetensors(self.shard(index), entries, {"format": "pt"})
            entry = {"file": self.shard(index).name, **asdict(written), "verbatim": list(verbatim), **body}
            write_json(self._entry_path(index), entry)
        except OSError as error:
            raise _unwritten(self.shard(index), error) from error
        return entry

    def amend(self, index: int | None, changed: Mapping[str, Tensor]) -> dict[str, Any]:
        """Put other values of the same shape and dtype into a finished shard; its new journal entry.

        The new shard waits in the journal until the entry tells its hash, so that a kill leaves either the old or the new state.
        """
        entry = _read(self._entry_path(index)) or {}
        infos = read_header(self.shard(index))
        mine = {name: changed[name] for name in infos if name in changed}
        if not mine:
            return entry
        entries = [Entry.of(name, mine[name]) if name in mine else Entry(name, i.dtype, i.shape, i.load) for name, i in infos.items()]
        try:
            entry = {**entry, **asdict(write_safetensors(self._staged(index), entries, {"format": "pt"}))}
            write_json(self._entry_path(index), entry)
            os.replace(self._staged(index), self.shard(index))
        except OSError as error:
            raise _unwritten(self.shard(index), error) from error
        return entry

    @property
    def tuning_state(self) -> Path:
        """Where a tuning saves how far it is."""
        return self.folder / JOURNAL / "tuning.safetensors"

    def keep_tuned(self, changed: Mapping[str, Tensor], summary: dict[str, Any]) -> None:
        """Write down a finished tuning: the stored tensors it changed, and what it came to."""
        try:
            entries = [Entry.of(name, tensor.contiguous()) for name, tensor in changed.items()]
            write_safetensors(self.folder / JOURNAL / TUNED, entries, {"summary": json.dumps(summary)})
        except OSError as error:
            raise _unwritten(self.folder / JOURNAL / TUNED, error) from error

    def tuned(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `keep_tuned` wrote, if it did."""
        path = self.folder / JOURNAL / TUNED
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["summary"])  # noqa: SIM118

    def _staged(self, index: int | None) -> Path:
        return self.folder / JOURNAL / self.shard(index).name

    def _entry_path(self, index: int | None) -> Path:
        return self.folder / JOURNAL / ("outer.json" if index is None else f"block-{index:05d}.json")

    # ---- the end ----------------------------------------------------------------------------------------------------

    def finish(self, source: Source, specs: Mapping[str, Spec], layout: str, biased: frozenset[str], report: dict[str, Any]) -> None:
        """Index, companions, config and report; then the journal goes. Doing it twice gives the same files."""
        try:
            self._finish(source, quantization_config(layout, specs, biased), report)
        except OSError as error:
            raise _unwritten(self.folder, error) from error

    def _finish(self, source: Source, quantization: dict[str, Any], report: dict[str, Any]) -> None:
        shards = [self.shard(index) for index in (None, *range(self.blocks))]
        found = [(name, info) for shard in shards for name, info in read_header(shard).items()]
        write_index(self.folder, {name: Path(info.file).name for name, info in found}, sum(info.size for _, info in found))
        copy_companions(source.folder, self.folder, code=source.trust_remote_code)
        write_json(self.folder / "config.json", _config(source, quantization))
        write_json(self.folder / REPORT, report)
        shutil.rmtree(self.folder / JOURNAL)


def copy_companions(source: Path, folder: Path, *, code: bool) -> None:
    """Copy what lies beside the weights in folder `source`: tokenizer, generation settings, licenses, and its `code`."""
    for pattern in (*COMPANIONS, *(("*.py",) if code else ())):
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not path.name.endswith((".safetensors", ".bin")):
                shutil.copyfile(path, folder / path.name)


def _config(source: Source, quantization: dict[str, Any]) -> dict[str, Any]:
    """The config of the original with its quantization, and with `torch_dtype` beside `dtype`: the official vptq loader reads that."""
    floats = (tensor.dtype for tensor in source.tensors.values() if tensor.dtype.is_floating_point)
    stored = str(next(floats, torch.float32)).removeprefix("torch.")
    dtype = source.config.get("dtype") or source.config.get("torch_dtype") or stored
    return {**source.config, "dtype": dtype, "torch_dtype": dtype, "quantization_config": quantization}


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _difference(earlier: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first setting that differs: its name, what it was and what it is."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        parts = ((f"{key}[{name}]" if key else name, earlier.get(name), now.get(name)) for name in {**now, **earlier})
        return next((found for name, a, b in parts if (found := _difference(a, b, name))), None)
    return None if earlier == now else (key, earlier, now)


def _unwritten(path: Path, error: OSError) -> VoroqError:
    return VoroqError(f"cannot write {path}: {error.strerror}; free some space and continue with --resume")


def copied(source: Source, name: str) -> Entry:
    """The tensor `name` of `source`, to be written as it is; read when its turn comes."""
    return Entry(name, source.tensors[name].dtype, source.tensors[name].shape, lambda: source.tensor(name))


def check_claim(folder: Path, *, resume: bool) -> None:
    """Raise VoroqError where a run cannot begin in `folder`, or with `resume` go on there."""
    if folder.exists() and not folder.is_dir():
        raise VoroqError(f"{folder} is a file; choose a new folder for OUT")
    finished, begun = (folder / REPORT).is_file(), (folder / JOURNAL / "settings.json").is_file()
    if finished and not resume:
        raise VoroqError(f"{folder} already holds a finished voroq model; choose another OUT, or delete the folder")
    if begun and not resume:
        raise VoroqError(f"{folder} holds an unfinished run; continue it with --resume, or choose another OUT")
    if not finished and not begun and folder.is_dir() and any(path.name != JOURNAL for path in folder.iterdir()):
        raise VoroqError(f"{folder} exists and is not a voroq run; choose a new folder for OUT")


def check_new(folder: Path) -> None:
    """Raise VoroqError where a model cannot be written to `folder` because something is there."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise VoroqError(f"{folder} exists; choose a new folder for OUT")


def check_disk(folder: Path, needed: int) -> None:
    """Raise VoroqError unless the disk of `folder` has room for what of `needed` bytes an interrupted run has not written yet."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    needed -= sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise VoroqError(
            f"{folder} needs about {needed / 1e9:.3f} GB and its disk has {free / 1e9:.3f} GB free; free some space or choose another OUT"
        )
