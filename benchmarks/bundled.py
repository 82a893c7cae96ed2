"""One measurement on the bundled model, as every quality benchmark takes it: quantize, reload from disk, compare on three texts."""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voroq.evaluation.compare import compare
from voroq.pipeline.effort import Effort
from voroq.pipeline.plan import Budget, Plan
from voroq.pipeline.text import DEMO_MODEL
from voroq.prelude import quantize_with

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
    samples: int | None,
    windows: int,
    calibration: str | Sequence[str] = "calibration-c4",
    **options: Any,
) -> dict[str, Any]:
    """The row of `plan` at `effort`, calibrated on `samples` windows, if None as many as the effort has; seconds are those of all that
    makes the model. Bits are per weight of the model as it was."""
    with tempfile.TemporaryDirectory() as folder:
        out, began = str(Path(folder) / "model"), time.perf_counter()
        report = quantize_with(effort, DEMO_MODEL, out, plan, calibration=calibration, context=256, samples=samples, **options)
        seconds = time.perf_counter() - began
        opening = {"device": "cpu", "dtype": "float32"}
        measured = compare(out, list(TEXTS), against=DEMO_MODEL, context=256, windows=windows, opening=opening)
    bits = report.get("share_of_weights", 1.0) * report["bits_per_weight"]
    found = row("voroq", label, bits, tuple(text.perplexity for text in measured.texts))
    done = {**found, "kl": measured.kl, "seconds": seconds}
    print({**done, "share": report.get("share_of_weights"), "kl of each": [text.kl for text in measured.texts]}, flush=True)
    return done
