"""Rotations folded into the weights of a model: same function, same architecture, other numbers.

A random rotation of the residual stream, and of the values of each block's attention, spreads outliers over all directions
(SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024; QuaRot, arXiv 2404.00456; of their rotations these two cost nothing at
inference). `roles` and `heads` find who reads and writes, `fold` says what becomes of a weight; here it is done, tensor by tensor.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.numerics.hadamard import random_signs, split
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.shards import write_index
from voroq.pipeline.compat import build_skeleton
from voroq.pipeline.fold import Fold
from voroq.pipeline.heads import Heads, find_heads
from voroq.pipeline.output import check_disk, check_new, copy_companions
from voroq.pipeline.progress import Progress, Silent
from voroq.pipeline.roles import Roles, find_roles
from voroq.pipeline.source import INDEX, Source, open_source
from voroq.pipeline.weights import Weights, finite

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def rotate_model(
    source: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    heads: bool = True,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model `source` (folder or hub id) to the new folder `out` with its residual stream rotated, and its value heads if
    `heads`; return what was done. `dtype` is the stored one (float64, float32, float16, bfloat16), the source's if None.

    The function computed is the same but for rounding. Arithmetic is float64; memory holds one tensor, and
    of all but the value linears only a part in float64.
    Raises VoroqError for a model that cannot be rotated exactly, saying why, and before anything is written.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    if dtype is not None and dtype not in DTYPES:
        raise VoroqError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}")
    origin = open_source(source, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(origin.folder, dtype=torch.float64, trust_remote_code=trust_remote_code)
    roles = find_roles(skeleton)
    turned = find_heads(skeleton, roles) if heads else ()
    job = Rotation(origin, *_assigned(origin, skeleton, roles, turned, seed), DTYPES.get(dtype or ""))
    shards = job.shards()
    folder = Path(out)
    check_new(folder)
    check_disk(folder, sum(entry.size for entries in shards.values() for entry in entries))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, entries in shards.items():
            progress.stage(f"rotating {file}")
            write_safetensors(folder / file, entries, {"format": "pt"})
        _finish(origin, folder, shards, untied=bool(job.copies), dtype=dtype)
    except OSError as error:
        raise VoroqError(f"cannot write to {folder}: {error.strerror}; free some space, or choose another OUT") from error
    return {
        "source": str(source),
        "seed": seed,
        "width": roles.width,
        "block": split(roles.width)[0],
        "readers": len(roles.readers),
        "writers": len(roles.writers),
        "heads": len(turned),
        "head_dim": turned[0].dim if turned else None,
        "untied": bool(job.copies),
        "bytes": sum(entry.size for entries in shards.values() for entry in entries),
        "seconds": time.perf_counter() - began,
    }


@dataclass(frozen=True)
class Rotation:
    """What becomes of every tensor on disk, by its name there.

    folds    weights and biases
    gains    norms of the stream: the value that leaves a gain of 1
    readers  the norm (tensor on disk, offset) whose gain goes into a weight
    copies   tensors that the output has and the source has under another name (a head tied to the embedding)
    dtype    the stored one, None for each tensor's own
    """

    source: Source
    folds: dict[str, Fold]
    gains: dict[str, float]
    readers: dict[str, tuple[str, int]]
    copies: dict[str, str]
    dtype: torch.dtype | None

    def shards(self) -> dict[str, list[Entry]]:
        """The tensors to write, by file; a copy lies beside its original."""
        files: dict[str, list[Entry]] = {file: [] for file in self.source.files()}
        for name, known in (*((name, name) for name in self.source.tensors), *self.copies.items()):
            stored = self.source.tensors[known]
            if name in self.folds and stored.dtype not in DTYPES.values():
                raise VoroqError(f"weight {known} is stored as {stored.dtype}; give a model in float16, bfloat16 or float32")
            dtype = self.dtype if self.dtype is not None and stored.dtype.is_floating_point else stored.dtype
            files[stored.file].append(Entry(name, dtype, stored.shape, lambda name=name, dtype=dtype: self.load(name, dtype)))
        return files

    def load(self, name: str, dtype: torch.dtype) -> Tensor:
        """The new tensor `name` in `dtype`. Raises VoroqError if the old one is damaged or the new one does not fit `dtype`."""
        old = self._finite(self.copies.get(name, name))
        if name in self.gains:
            return torch.full_like(old, self.gains[name], dtype=dtype)
        if name not in self.folds:
            return old.to(dtype)
        fold = self.folds[name]
        if name in self.readers:
            norm, offset = self.readers[name]
            fold = replace(fold, gain=self._finite(norm).double() + offset)
        new = fold.weight(old, dtype) if old.dim() == 2 else fold.bias(old, dtype)
        if not finite(new):
            raise VoroqError(f"{name}, rotated, does not fit {dtype}; store the model as float32 (--dtype float32)")
        return new

    def _finite(self, name: str) -> Tensor:
        tensor = self.source.tensor(name)
        if tensor.is_floating_point() and not finite(tensor):
            file = self.source.folder / self.source.tensors[name].file
            raise VoroqError(f"tensor {name} in {file} holds NaN or infinity; the checkpoint is damaged, get it again")
        return tensor


def _assigned(
    origin: Source, skeleton: nn.Module, roles: Roles, turned: tuple[Heads, ...], seed: int
) -> tuple[dict[str, Fold], dict[str, float], dict[str, tuple[str, int]], dict[str, str]]:
    """Folds, gains, readers and copies of a `Rotation`."""
    disk = Disk(origin, skeleton)
    folds: dict[str, Fold] = {}
    readers: dict[str, tuple[str, int]] = {}
    copies: dict[str, str] = {}
    for module, fold in _folds(roles, turned, seed).items():
        weight = f"{module}.weight"
        name = disk.find(weight)
        if name is None:
            name, copies[weight] = weight, disk.tied(weight)
        folds[name] = fold
        if module in roles.readers:
            norm = roles.readers[module]
            readers[name] = (disk.need(f"{norm}.weight"), roles.norms[norm])
        bias = disk.find(f"{module}.bias")
        if bias is not None and (fold.writes is not None or fold.values is not None):
            folds[bias] = fold
    gains = {disk.need(f"{norm}.weight"): 1.0 - offset for norm, offset in roles.norms.items()}
    return folds, gains, readers, copies


def _folds(roles: Roles, turned: tuple[Heads, ...], seed: int) -> dict[str, Fold]:
    """What happens to every embedding and linear, gains not yet in it. Signs are drawn for the stream, then block by block."""
    rng = torch.Generator().manual_seed(seed)
    stream = random_signs(roles.width, rng)
    folds = {name: Fold(reads=stream) for name in (*roles.embeddings, *roles.readers)}
    for name in roles.writers:
        folds[name] = replace(folds.get(name, Fold()), writes=stream)
    for heads in turned:
        signs = random_signs(heads.dim, rng)
        folds[heads.value] = replace(folds[heads.value], values=signs, rows=heads.rows)
        folds[heads.output] = replace(folds[heads.output], averages=signs)
    return folds


class Disk:
    """Names on disk by names in the model. Raises VoroqError for a checkpoint that is not tensor by tensor the model's."""

    def __init__(self, source: Source, skeleton: nn.Module) -> None:
        self.source = source
        self._weights = Weights(source, skeleton, torch.device("cpu"))
        self._names = {target: group.sources[0][1] for group in self._weights.groups for target in group.shapes}
        self._whole = {target for group in self._weights.groups if group.converter is None for target in group.shapes}

    def find(self, name: str) -> str | None:
        """The tensor on disk that is the model's `name`; None if there is none."""
        if name in self._names and name not in self._whole:
            raise VoroqError(f"{name} is stored in pieces ({self._names[name]}, ...); save the model with transformers and rotate that")
        return self._names.get(name)

    def need(self, name: str) -> str:
        found = self.find(name)
        if found is None:
            raise VoroqError(f"{self.source.name} has no tensor for {name}; the checkpoint is incomplete or of another architecture")
        return found

    def tied(self, name: str) -> str:
        """The tensor on disk that the absent `name` shares its values with."""
        return self.need(self._weights.tied(name) or name)


def _finish(origin: Source, folder: Path, shards: Mapping[str, list[Entry]], *, untied: bool, dtype: str | None) -> None:
    """Index, companions, and last config.json: without it the folder is no model."""
    if (origin.folder / INDEX).is_file():
        places = {entry.name: file for file, entries in shards.items() for entry in entries}
        total = sum(entry.size for entries in shards.values() for entry in entries)
        write_index(folder, places, total)
    copy_companions(origin.folder, folder, code=origin.trust_remote_code)
    config = dict(origin.config)
    if untied:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    write_json(folder / "config.json", config)
