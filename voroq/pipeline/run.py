"""The run: block by block, one block in memory, every finished block on disk.

    parallel     every block sees the original model: observe and pass on in one go, then quantize
    sequential   every block sees its quantized predecessors: observe, quantize, pass on what the quantized block makes of it
    asymmetric   the same, and weights first become those that answer the inputs they see as the originals answered theirs

An interrupted run repeats the forward passes of finished blocks (cheap) and none of their quantization, so it meets the same
numbers and ends with the same bytes.
"""

import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import voroq
from voroq.errors import VoroqError
from voroq.methods import Method, is_guided, is_one_sided, is_slow_two_sided, tile_height
from voroq.moments import Moments
from voroq.numerics.linalg import answering
from voroq.packed.base import Packed, Spec
from voroq.packed.format import pack, spec_type, unpack
from voroq.pipeline.activations import Activations
from voroq.pipeline.blocks import Site
from voroq.pipeline.calibration import Texts, calibration_windows
from voroq.pipeline.calibration import described as described_text
from voroq.pipeline.finished import put_back, tune_finished
from voroq.pipeline.gradients import gradient_windows, observe_guided, observe_outputs, output_gradients, stored_bytes
from voroq.pipeline.model import OpenModel, open_model
from voroq.pipeline.observe import borrow_prior, observe_block, observe_shift, run_block
from voroq.pipeline.output import Output, check_disk
from voroq.pipeline.plan import Budget, Plan
from voroq.pipeline.preflight import ACTIVATIONS_IN_MEMORY, prepare, windows_at_once
from voroq.pipeline.progress import Progress, Silent
from voroq.pipeline.source import open_source
from voroq.pipeline.tokenizer import load_tokenizer
from voroq.pipeline.totals import described, totals
from voroq.pipeline.tune import block_batches, check_head, check_memory, tune_block
from voroq.pipeline.work import SiteJob, resolve_devices, share
from voroq.tuning.loop import Tuning

ANSWERING = 0.01
"""Weight of the original matrix where weights are made to answer other inputs, relative to the inputs' mean square."""


def quantize_model(
    source: str | Path,
    out: str | Path,
    plan: Plan | Budget | Method,
    *,
    calibration: Texts = None,
    samples: int | None = None,
    context: int | None = None,
    mode: str = "parallel",
    hessian: str = "auto",
    interleave: bool = True,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    block_tuning: Tuning | None = None,
    tuning: Tuning | None = None,
    teacher: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Quantize the model in folder (or with hub id) `source` into the new folder `out` and return the report.

    `plan` is a method for every site, a `Plan` with rules by name, or a `Budget` of bits per weight. `calibration` is a text file, a
    bundled name or "dataset:NAME" (the bundled mixed text if None), of which `samples` windows of `context` tokens are used.
    `hessian` says what errors are weighed by: input (second moments of each linear's inputs), two-sided (and of the gradients at its
    outputs), guided (of the inputs, for every group of outputs by its gradients), or auto: two-sided where that is used and quick.
    `interleave` reorders the channels inside MLPs where vectors of weights span rows (`pipeline/interleave.py`).
    `device` is auto, cpu, cuda or a list of devices. `block_tuning` tunes every quantized block towards the original block's output
    on the same inputs, `tuning` the whole quantized model towards the original's logits afterwards (both are then in memory), or towards
    those of another model, `teacher`, of which `source` is a pruned form (at `revision`, where `source` is a folder). With `resume`
    an interrupted run goes on; the result has the same bytes. Seconds count from `began` (time.perf_counter), where a run began earlier.

    Everything that can be refused is refused before the first block. Raises VoroqError (FormatError for damaged files).
    """
    progress, began = progress or Silent(), time.perf_counter() if began is None else began
    block_tuning = block_tuning if block_tuning is not None and block_tuning.steps else None
    devices = resolve_devices(device)
    model = _original(source, devices[0], revision, trust_remote_code)
    _check_modes(model, mode, hessian, tuning)
    taught = None if teacher is None else _teacher(model, teacher, tuning, revision)
    if tuning is not None and tuning.steps:
        check_memory(model, taught)
    ready = prepare(model, plan, calibration=calibration, samples=samples, context=context, mode=mode, seed=seed, progress=progress)
    hessian = _resolved(model, hessian, ready.methods, devices)
    check_disk(Path(out), ready.bytes + (_gradient_bytes(model, ready.windows) if hessian != "input" else 0))
    if interleave:
        model.interleave(lambda name: tile_height(ready.plan.method_for(name)))
    settings = {**ready.settings, "hessian": hessian, "interleave": interleave, "block_tuning": repr(block_tuning), "tuning": repr(tuning)}
    settings |= {} if taught is None else {"teacher": taught.source.fingerprint()}
    if tuning is not None:
        context = ready.windows.shape[1]
        more, mark = calibration_windows(load_tokenizer(model.source), calibration, samples=tuning.samples, context=context, seed=seed)
        settings["tuning"] += f" on {more.shape[0]} windows with the hash {mark[:16]}"
    output = Output(Path(out), model.n_blocks, settings, resume=resume)
    if output.report is not None:
        return output.report
    run = Run(model, ready.plan, output, ready.layout, ready.dtype, mode, hessian, seed, devices, block_tuning, progress)
    entries = [run.outer(), *run.blocks(ready.windows)]
    tuned = None
    if tuning is not None and tuning.steps:
        at = (output, ready.layout, ready.dtype)
        entries, tuned = tune_finished(model, *at, entries, more, tuning, teacher=taught, seed=seed, progress=progress)
    report = {
        "voroq_report": 1,
        "version": voroq.__version__,
        "source": str(source if teacher is None else teacher),
        **described(ready.methods),
        "mode": mode,
        "hessian": hessian,
        "seed": seed,
        "calibration": {"text": described_text(calibration), **dict(zip(("samples", "context"), ready.windows.shape, strict=True))},
    }
    report |= {**totals(model.source, entries, began), **_share(model, taught), "tuning": tuned, "settings": settings}
    read = spec_type(ready.layout).from_json
    specs: dict[str, Spec] = {name: read(data, name) for entry in entries for name, data in entry["specs"].items()}
    output.finish(model.source, specs, ready.layout, frozenset(name for entry in entries for name in entry["biased"]), report)
    progress.done()
    return report


def _original(source: str | Path, device: torch.device, revision: str | None, trust_remote_code: bool) -> OpenModel:
    origin = open_source(source, revision=revision, trust_remote_code=trust_remote_code)
    if origin.config.get("quantization_config"):
        raise VoroqError(f"{source} is already quantized (config.json has a quantization_config); give the original model")
    return open_model(origin, device=device)


def check_tuning_of(source: str | Path, *, device: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Raise VoroqError where the model in `source` cannot be tuned as a whole; for those who do something before they run."""
    model = _original(source, resolve_devices(device)[0], revision, trust_remote_code)
    check_head(model)
    check_memory(model)


def check_teacher_of(
    source: str | Path,
    teacher: str | Path,
    tuning: Tuning | None,
    *,
    device: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Raise VoroqError where `source` cannot be tuned towards `teacher`; for those who plan before they run."""
    origin = open_source(source, revision=revision, trust_remote_code=trust_remote_code)
    _teacher(open_model(origin, device=resolve_devices(device)[0]), teacher, tuning, revision)


def _teacher(model: OpenModel, teacher: str | Path, tuning: Tuning | None, revision: str | None) -> OpenModel:
    """The model to tune towards. Raises VoroqError where nothing is tuned, and where its answers or blocks are not of `model`'s kind."""
    if tuning is None:
        raise VoroqError("a teacher is what tuning aims at, and nothing is tuned here: leave it out, or ask for --effort balanced or best")
    revision = revision if Path(model.source.name).is_dir() else None
    found = open_model(open_source(teacher, revision=revision, trust_remote_code=model.source.trust_remote_code), device=model.device)
    ours, theirs = model.config.get_text_config(), found.config.get_text_config()
    for what in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, its = getattr(ours, what, None), getattr(theirs, what, None)
        if mine != its:
            raise VoroqError(f"the teacher {teacher} has {what} {its} and {model.source.name} {mine}: give the model that it was made of")
    return found


def _share(model: OpenModel, teacher: OpenModel | None) -> dict[str, float]:
    """How many of the weights of `teacher`'s linears are left in `model`."""
    return {"share_of_weights": 1.0 if teacher is None else model.linear_weights / teacher.linear_weights}


def _check_modes(model: OpenModel, mode: str, hessian: str, tuning: Tuning | None) -> None:
    if mode not in ("parallel", "sequential", "asymmetric"):
        raise VoroqError(f"mode {mode!r} is unknown; choose parallel, sequential or asymmetric")
    if hessian not in ("auto", "input", "two-sided", "guided"):
        raise VoroqError(f"hessian {hessian!r} is unknown; choose auto, input, two-sided or guided")
    if model.skeleton.get_output_embeddings() is not None:
        return
    name = model.source.name
    if hessian in ("two-sided", "guided"):
        raise VoroqError(f"{name} has no language model head, so there are no gradients of its answers; use --hessian input")
    if tuning is not None:
        check_head(model)


def _gradient_bytes(model: OpenModel, windows: torch.Tensor) -> int:
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    return stored_bytes(*windows.shape, windows_at_once(windows.shape[1]), width, model.n_blocks, ACTIVATIONS_IN_MEMORY)


def _resolved(model: OpenModel, hessian: str, methods: Sequence[Method], devices: Sequence[torch.device]) -> str:
    """What errors are weighed by in this run: input, two-sided or guided."""
    if hessian == "guided":
        deaf = [method for method in methods if not is_guided(method)]
        if deaf:
            raise VoroqError(f"hessian guided is for vptq; {type(deaf[0]).__name__} takes --hessian input, two-sided or auto")
        return hessian
    head = model.skeleton.get_output_embeddings() is not None
    able = [method for method in methods if not is_one_sided(method) and (hessian != "auto" or not is_slow_two_sided(method, devices))]
    return "two-sided" if head and hessian != "input" and able else "input"


@dataclass(frozen=True)
class Run:
    """What the block loop needs, in one place; no state of its own but what lies in the output folder."""

    model: OpenModel
    plan: Plan
    output: Output
    layout: str
    dtype: torch.dtype
    mode: str
    hessian: str
    seed: int
    devices: tuple[torch.device, ...]
    block_tuning: Tuning | None
    progress: Progress

    def outer(self) -> dict[str, Any]:
        """Write the shard of everything outside the blocks, tensor by tensor; its journal entry."""
        entry = self.output.entry(None)
        if entry is not None:
            return entry
        self.progress.stage("copying what stays as it is")
        body = {"sites": [], "specs": {}, "biased": [], "seconds": 0.0}
        return self.output.write(None, self.model.source, self.model.outer_tensors(), {}, body)

    def blocks(self, windows: torch.Tensor) -> list[dict[str, Any]]:
        """Quantize every block that is not done; the journal's entries of all."""
        entries = [self.output.entry(index) for index in range(self.model.n_blocks)]
        left = sum(len(self.model.sites(index)) for index, entry in enumerate(entries) if entry is None)
        self.progress.start(self.model.n_blocks, left)
        if None not in entries:
            return entries
        batch = windows_at_once(windows.shape[1])
        self.progress.stage("embedding the calibration text")
        last = max(index for index, entry in enumerate(entries) if entry is None)
        others = block_batches(self.block_tuning, tuple(windows.shape), self.seed) if self.block_tuning is not None else ()
        store = self.model.capture(windows, batch, others=others, limit=ACTIVATIONS_IN_MEMORY, folder=self.output.folder)
        with ExitStack() as stack:
            states, originals = stack.enter_context(store), None
            if self.mode == "asymmetric":
                again = self.model.capture(windows, batch, others=others, limit=ACTIVATIONS_IN_MEMORY, folder=self.output.folder)
                originals = stack.enter_context(again)
            gradients: list[Activations | None] = [None] * self.model.n_blocks
            if self.hessian != "input":
                gradients = [stack.enter_context(one) for one in self._gradients(windows, states, batch)]
            for index in range(last + 1):
                self.progress.block(index, self.model.block_name(index))
                if entries[index] is None:
                    entries[index] = self._quantize(index, states, originals, gradients[index], batch, more=index < last)
                else:
                    self._replay(index, states, originals, batch, entries[index], more=index < last)
        return entries

    def _gradients(self, windows: torch.Tensor, states: Activations, batch: int) -> list[Activations]:
        """The gradients at every block's output, for as many windows as that takes."""
        tokens = windows[: gradient_windows(*windows.shape, batch)]
        room = {"limit": ACTIVATIONS_IN_MEMORY, "folder": self.output.folder}
        return output_gradients(self.model, tokens, states, batch, seed=self.seed, progress=self.progress, **room)

    def _quantize(
        self, index: int, states: Activations, originals: Activations | None, gradients: Activations | None, batch: int, *, more: bool
    ) -> dict[str, Any]:
        began = time.perf_counter()
        model = self.model
        block = model.load_block(index)
        linears = model.linears(block, index)
        chosen = [site for site in model.sites(index) if self.plan.method_for(site.name) is not None]
        self.progress.stage("observing")
        curvature: dict[str, dict[str, torch.Tensor]] = {}
        if gradients is not None:
            look, kind = (observe_guided, "groups") if self.hessian == "guided" else (observe_outputs, "outputs")
            found = look(model, block, index, states, gradients, batch, sites=[site.name for site in chosen])
            curvature = {name: {kind: moment} for name, moment in found.items()}
            gradients.close()
        outputs = states if more and self.mode == "parallel" and self.block_tuning is None else None
        moments, tokens = observe_block(model, block, index, states, batch, sites=[site.name for site in chosen], outputs=outputs)
        moments = {name: dataclasses.replace(seen, **curvature.get(name, {})) for name, seen in moments.items()}
        moments, notes = _with_priors(chosen, moments)
        jobs, shifts = [], {}
        if originals is not None:
            shifts = observe_shift(model, block, index, originals, states, batch, sites=[site.name for site in chosen])
            run_block(model, block, index, originals, batch, originals)
        for name in (site.name for site in chosen):
            method, weight = self.plan.method_for(name), linears[name].weight.detach()
            if name in shifts:
                weight = answering(weight.float(), moments[name].second, shifts[name], ANSWERING)
            jobs.append(SiteJob(name, method, weight, moments[name], self.seed, self.dtype, self.layout, notes.get(name, ())))
        packed: dict[str, Packed] = {}
        rows = []
        self.progress.stage("quantizing")
        for done in share(lambda job, device: job(device), jobs, self.devices):
            packed[done.name] = done.packed
            rows.append({**done.row, "tokens": tokens[done.name]})
            self._say(done.row)
        tuned = None
        if packed and self.block_tuning is not None:
            self.progress.stage("tuning the block")
            packed, tuned = self._tune(block, index, packed, states)
            losses = {job.name: job.loss(packed[job.name]) for job in jobs}
            rows = [{**row, "loss": losses[row["name"]]} for row in rows]
        del moments, jobs, curvature, shifts
        if self.mode != "parallel":
            for name, one in packed.items():
                linears[name].weight.data.copy_(unpack(one).dequantize())
        if more and outputs is None:
            self.progress.stage("passing on")
            run_block(model, block, index, states, batch, states)
        biased = [name for name in packed if linears[name].bias is not None]
        del linears
        model.drop_block(index)
        self.progress.stage("writing")
        specs = {name: one.spec.to_json(bias=name in biased) for name, one in packed.items()}
        body = {"sites": rows, "specs": specs, "biased": biased, "tuned": tuned, "seconds": time.perf_counter() - began}
        return self.output.write(index, model.source, _verbatim(model, index, packed), packed, body)

    def _tune(
        self, block: nn.Module, index: int, packed: dict[str, Packed], states: Activations
    ) -> tuple[dict[str, Packed], dict[str, float]]:
        """The block's linears, tuned together to answer `states` as `block` does; its relative error before and after."""
        sites = {name: unpack(one) for name, one in packed.items()}
        done = tune_block(self.model, block, index, sites, states, self.block_tuning, seed=self.seed)
        packed = {name: pack(q, self.dtype, self.layout) for name, q in done.sites.items()}
        return packed, {"before": done.before, "after": done.after}

    def _replay(
        self, index: int, states: Activations, originals: Activations | None, batch: int, entry: dict[str, Any], *, more: bool
    ) -> None:
        """Pass the states through a finished block, as the interrupted run did."""
        if not more:
            return
        self.progress.stage("passing on")
        block = self.model.load_block(index)
        if originals is not None:
            run_block(self.model, block, index, originals, batch, originals)
        if self.mode != "parallel":
            put_back(self.model.linears(block, index), self.output.shard(index), entry["specs"], self.layout)
        run_block(self.model, block, index, states, batch, states)
        self.model.drop_block(index)

    def _say(self, row: dict[str, Any]) -> None:
        self.progress.site(row["name"], row["seconds"], row["loss"])
        for note in row["notes"]:
            self.progress.warn(f"{row['name']}: {note}")


def _verbatim(model: OpenModel, index: int, packed: dict[str, Packed]) -> list[str]:
    """Tensors of a block that are copied: all but those whose content went into quantized sites."""
    return [name for name in model.block_tensors(index) if not set(model.site_of(name) or ()) & set(packed)]


def _with_priors(sites: Sequence[Site], moments: dict[str, Moments]) -> tuple[dict[str, Moments], dict[str, tuple[str, ...]]]:
    """Experts that saw fewer tokens than they have columns borrow from their siblings; notes say which, and what else is thin."""
    families: dict[str, dict[str, Moments]] = defaultdict(dict)
    out, notes = dict(moments), {}
    for site in sites:
        if site.expert:
            families[re.sub(r"\.\d+\.(?=[^.]+$)", ".*.", site.name)][site.name] = moments[site.name]
        elif moments[site.name].count < site.shape[1]:
            notes[site.name] = (f"{moments[site.name].count} calibration tokens for {site.shape[1]} input columns; use more samples",)
    for family in families.values():
        columns = next(iter(family.values())).first.shape[0]
        topped, poor = borrow_prior(family, columns)
        out.update(topped)
        for name in poor:
            notes[name] = (f"saw {moments[name].count} tokens for {columns} input columns; borrowed from its sibling experts",)
    return out, notes
