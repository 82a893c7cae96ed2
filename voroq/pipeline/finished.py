"""What lies in finished blocks, and tuning all of them together when the last one is done."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from voroq.packed.base import Packed, Spec
from voroq.packed.format import pack, spec_type, unpack
from voroq.packed.shards import read_header
from voroq.pipeline.model import OpenModel
from voroq.pipeline.output import Output
from voroq.pipeline.progress import Progress
from voroq.pipeline.tune import student_of, tune
from voroq.tuning.loop import Tuning

Entries = list[dict[str, Any]]


def tune_finished(
    model: OpenModel,
    output: Output,
    layout: str,
    dtype: torch.dtype,
    entries: Entries,
    windows: Int[Tensor, "windows ctx"],
    tuning: Tuning,
    *,
    teacher: OpenModel | None,
    seed: int,
    progress: Progress,
) -> tuple[Entries, dict[str, Any]]:
    """Tune the finished blocks together towards `teacher` (`model` where that is None), and put the result into their shards; the
    entries then, and what it came to."""
    began = time.perf_counter()
    if output.tuned() is None:
        progress.stage("tuning")
        specs = {name: spec_type(layout).from_json(data, name) for entry in entries for name, data in entry["specs"].items()}
        shards = [output.shard(index) for index in range(model.n_blocks)]
        original = model.whole()
        sites = {name: unpack(packed) for shard in shards for name, packed in stored_sites(shard, specs)}
        student = student_of(original, sites, model.whole)
        sources = {name: model.plain_source(name) for name, _ in original.named_parameters()}
        free = frozenset(name for name, source in sources.items() if source is not None)
        blocks = [model.block_name(index) for index in range(model.n_blocks)]
        rest = {"seed": seed, "state": output.tuning_state, "progress": progress}
        if teacher is not None:
            del original  # two models are in memory at a time
            original = teacher.whole()
        done = tune(original, student, windows, tuning, free=free, blocks=blocks, **rest)
        changed = {sources[name]: t.to(model.source.tensors[sources[name]].dtype) for name, t in done.others.items()}
        for name, q in done.sites.items():
            changed |= {f"{name}.{key}": tensor.cpu() for key, tensor in pack(q, dtype, layout).tensors.items()}
        summary = {"steps": done.steps, "kl_before": done.before, "kl_after": done.after, "seconds": time.perf_counter() - began}
        output.keep_tuned(changed, {**dataclasses.asdict(tuning), **summary})
    changed, summary = output.tuned()
    return [output.amend(index, changed) for index in (None, *range(model.n_blocks))], summary


def put_back(linears: Mapping[str, nn.Linear], shard: Path, specs: Mapping[str, Any], layout: str) -> None:
    """The weights a finished block stands for, from its shard into its linears."""
    for name, packed in stored_sites(shard, {name: spec_type(layout).from_json(data, name) for name, data in specs.items()}):
        linears[name].weight.data.copy_(unpack(packed).dequantize())


def stored_sites(shard: Path, specs: Mapping[str, Spec]) -> Iterator[tuple[str, Packed]]:
    """Those of the sites in `specs` that lie in `shard`."""
    header = read_header(shard)
    for name, spec in specs.items():
        names = {stored.name: f"{name}.{stored.name}" for stored in spec.layout()}
        if all(full in header for full in names.values()):
            yield name, Packed(spec, {short: header[full].load() for short, full in names.items()})
