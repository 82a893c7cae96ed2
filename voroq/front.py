"""The front door for making: a run, and the model card that tells what came of it."""

from functools import wraps
from pathlib import Path
from typing import Any

from voroq.pipeline import run
from voroq.report.card import write_card


@wraps(run.quantize_model)
def quantize_model(source: str | Path, out: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
    report = run.quantize_model(source, out, *args, **options)
    write_card(out)
    return report
