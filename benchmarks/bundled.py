"""One measurement on the bundled model, as every quality benchmark takes it: quantize, reload from disk, compare on three texts."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from voroq.evaluation.compare import compare
from voroq.pipeline.effort import Effort
from voroq.pipeline.plan import Budget, Plan
from voroq.pipeline.planning import plan_model
from voroq.pipeline.prune import prune_model
from voroq.pipeline.run import quantize_model
from voroq.pipeline.text import DEMO_MODEL

TEXTS = ("wikitext2", "books", "c4")
FULL = (39.8151, 38.9336, 93.0934)
"""Perplexities of the original on the first 100 windows of 256 tokens of each text."""


def gap(perplexities: tuple[float, ...]) -> float:
    """Mean over the texts of ln(perplexity / full-precision perplexity)."""
    return sum(math.log(a / b) for a, b in zip(perplexities, FULL, strict=True)) / len(FULL)


def row(who: str, setting: str, bits: float, found: tuple[float, ...]) -> dict[str, Any]:
    texts = dict(zip(TEXTS, found, strict=True))
    return {"row": who, "setting": setting, "bpw": bits, **texts, "gap": gap(found), "kl": None, "seconds": None}


def measure(
    label: str,
    plan: Plan | Budget,
    effort: Effort,
    *,
    samples: int,
    windows: int,
    calibration: str | Sequence[str] = "calibration-c4",
    interleave: bool = True,
    channels: int | None = None,
    prune_steps: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """The row of `plan` at `effort`, calibrated on `samples` windows; seconds are those of pruning, planning, quantizing and tuning.

    With `channels` MLPs are pruned to so many first, and tuned for `prune_steps`; the budget's bits are for the weights of the model as
    it was.
    """
    text = {"calibration": calibration, "context": 256}
    with tempfile.TemporaryDirectory() as folder:
        out, began, source, share = str(Path(folder) / "model"), time.perf_counter(), DEMO_MODEL, 1.0
        if channels:
            source = Path(folder) / "pruned"
            pruned = prune_model(DEMO_MODEL, source, **text, channels=channels, steps=prune_steps, samples=samples)
            share = pruned["share_of_weights"]
            plan = replace(plan, bits=plan.bits / share)
            options |= {"teacher": DEMO_MODEL} if effort.tuning else {}
        if effort.allocates(plan):
            plan = plan_model(source, plan, **text, interleave=interleave, samples=min(samples, 64)).plan
        how = {"tuning": effort.tuning, "interleave": interleave, **options}
        report = quantize_model(source, out, plan, **text, samples=samples, **how)
        seconds = time.perf_counter() - began
        opening = {"device": "cpu", "dtype": "float32"}
        measured = compare(out, list(TEXTS), against=DEMO_MODEL, context=256, windows=windows, opening=opening)
    found = row("voroq", label, share * report["bits_per_weight"], tuple(text.perplexity for text in measured.texts))
    done = {**found, "kl": measured.kl, "seconds": seconds}
    print({**done, "kl of each": [text.kl for text in measured.texts]}, flush=True)
    return done
