"""What an effort does before a run and around it: text by the model itself, fewer channels, bits where they are worth most.

    own text    documents that the model writes, half of them as texts begin and half begun anywhere, beside the calibration text
    channels    the plan says how many of the MLPs' channels pay for themselves; the rest is quantized and tuned towards the original
    bits        the budget, allocated

What takes minutes lies beside the journal in OUT until the run has ended, under names that say what it was made of, so that an interrupted
run finds it again.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from voroq.errors import VoroqError
from voroq.evaluation.generation import can_begin, documents, write_documents
from voroq.evaluation.models import max_positions, open_model
from voroq.front import quantize_model
from voroq.methods import Method
from voroq.pipeline.calibration import DEFAULT_SAMPLES, Texts, listed
from voroq.pipeline.effort import Effort
from voroq.pipeline.output import JOURNAL, check_claim
from voroq.pipeline.plan import Budget, Plan
from voroq.pipeline.planning import can_plan, plan_model
from voroq.pipeline.progress import Progress, Silent
from voroq.pipeline.prune import prune_model, share_left
from voroq.pipeline.run import check_teacher_of, check_tuning_of
from voroq.pipeline.source import open_source
from voroq.pipeline.work import resolve_devices
from voroq.tuning.loop import multiplies_bfloat16

TOKENS = 256
"""Of a document that the model writes, at most."""


def quantize_with(
    effort: Effort,
    source: str | Path,
    out: str | Path,
    plan: Plan | Budget | Method,
    *,
    allocate: bool | None = None,
    own_text: int | None = None,
    channels: int | None = None,
    teacher: str | Path | None = None,
    calibration: Texts = None,
    samples: int | None = None,
    context: int | None = None,
    interleave: bool = True,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantize the model `source` into the new folder `out` as `effort` does, and return the report; see `quantize_model`.

    `own_text` documents are written to calibrate on beside the text, `channels` are left in every MLP, 0 for all, and moments are of
    `samples` windows of `context` tokens; where they are None, as the effort has it. The bits of a budget are then per weight of `source`
    as it was. `allocate` spends them by what every linear is worth, if None where the effort does. `teacher` is what to tune towards,
    where that is not `source`. `options` go to the run.

    Raises VoroqError, for what can be refused before anything is done.
    """
    progress, began = progress or Silent(), time.perf_counter()
    place = {"device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    check_claim(Path(out), resume=resume)
    if allocate is None:
        allocate = effort.allocates(plan) and can_plan(source, **place)
    narrower = allocate and effort.narrower and channels is None and teacher is None and isinstance(plan, Budget) and plan.method == "vptq"
    if effort.tuning is not None:
        check_tuning_of(source, **place)
    if teacher is not None:
        check_teacher_of(source, teacher, effort.tuning, **place)
    share = _share_left(source, channels, effort, teacher, place) if channels else 1.0
    begun = Beginning(source, Path(out) / JOURNAL, seed, place, progress)
    if samples is None and effort.tokens and context:
        samples = max(DEFAULT_SAMPLES, effort.tokens // context)
    written = effort.own_text if own_text is None else own_text
    if written:
        calibration = [*listed(calibration), begun.own_text(written)]
    text = {"calibration": calibration, "context": context}
    if channels:
        teacher, source = source, begun.narrower(channels, samples=samples, **text)
        plan = replace(plan, bits=plan.bits / share) if isinstance(plan, Budget) else plan
    if allocate:
        found = plan_model(source, plan, narrower=narrower, interleave=interleave, seed=seed, progress=progress, **text, **place)
        plan = found.plan
        if found.channels is not None:
            teacher, source = source, begun.narrower(found.channels, samples=samples, **text)
    how = {"tuning": effort.tuning, "teacher": teacher, "samples": samples, "interleave": interleave, "seed": seed, "resume": resume}
    return quantize_model(source, out, plan, progress=progress, began=began, **how, **text, **place, **options)


def _share_left(source: str | Path, channels: int, effort: Effort, teacher: str | Path | None, place: Mapping[str, Any]) -> float:
    """How many of the weights are left with so many channels. Raises VoroqError where that cannot be asked for."""
    if teacher is not None or effort.tuning is None:
        raise VoroqError(
            "channels are left out of a model that is then tuned towards what it was: leave --channels out with a --teacher, and where "
            "nothing is tuned (--effort fast); voroq prune leaves them out without tuning"
        )
    return share_left(source, channels, **place)


@dataclass(frozen=True)
class Beginning:
    """What is made of the model `source` before its run, in `folder`."""

    source: str | Path
    folder: Path
    seed: int
    place: Mapping[str, Any]
    progress: Progress

    def own_text(self, count: int) -> Path:
        """The file with `count` documents by the model."""
        path = self.folder / f"own-text-{self._mark(count)}.jsonl"
        if path.is_file():
            return path
        self.progress.stage("writing text of its own")
        device = resolve_devices(self.place["device"])[0]
        dtype = "bfloat16" if multiplies_bfloat16(device) else "auto"
        model, tokenizer = open_model(str(self.source), dtype=dtype, **{**self.place, "device": str(device)})
        positions = max_positions(model)
        rest = {"tokens": TOKENS if positions is None else min(TOKENS, positions - 1), "seed": self.seed}
        begun = count - count // 2 if can_begin(tokenizer) else 0
        texts: list[str] = []
        for begin, number in [("bos", begun), ("anywhere", count - begun)]:
            for more in documents(model, tokenizer, number, begin=begin, **rest) if number else ():
                texts += more
                self.progress.stage(f"writing text of its own, {len(texts)} of {count} documents")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_documents(path, texts)
        return path

    def narrower(self, channels: int, **text: Any) -> Path:
        """The folder with the model of so many channels, calibrated on `text`."""
        path = self.folder / f"channels-{self._mark(channels, {name: str(value) for name, value in text.items()})}"
        if not (path / "config.json").is_file():  # the last of its files
            shutil.rmtree(path, ignore_errors=True)
            prune_model(self.source, path, channels=channels, seed=self.seed, progress=self.progress, **text, **self.place)
        return path

    def _mark(self, *made_of: Any) -> str:
        origin = open_source(self.source, revision=self.place["revision"], trust_remote_code=self.place["trust_remote_code"])
        mark = json.dumps([origin.fingerprint(), self.seed, *made_of], sort_keys=True)
        return hashlib.sha256(mark.encode()).hexdigest()[:12]
