"""Settings of PVQ judged where settings may be judged: KL to the original on calibration text that did not calibrate.

    python benchmarks/heldout.py --json benchmarks/results/heldout.json

The bundled model, moments of windows of 256 tokens from the first 93 % of calibration-c4; KL in nats per token on the last 7 % of it and on
the beginning of calibration-mixed, 64 windows each. No evaluation text is read.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, publish

from voroq.evaluation.compare import compare
from voroq.pipeline.effort import EFFORTS
from voroq.pipeline.plan import make_plan
from voroq.pipeline.run import quantize_model
from voroq.pipeline.text import DEMO_MODEL, bundled

ONE, TWO = {"hessian": "input"}, {"hessian": "two-sided"}
SETTINGS: list[tuple[float, dict[str, str], dict[str, Any]]] = [
    (3.0, {}, ONE),
    (3.0, {}, TWO),
    (3.25, {}, ONE),
    (3.25, {}, TWO),
    (3.25, {"rotation": "none"}, TWO),
    (3.25, {"rotation": "both"}, TWO),
]
"""Bits, options of the method, options of the run."""


def measure(bits: float, options: dict[str, str], run: dict[str, Any], *, samples: int, windows: int, folder: Path) -> dict[str, Any]:
    run, began, out = dict(run), time.perf_counter(), str(folder / "model")
    effort = EFFORTS[run.pop("effort", "fast")]
    plan = make_plan("pvq", bits, options)
    text = {"calibration": folder / "head.txt", "samples": samples, "context": 256}
    report = quantize_model(DEMO_MODEL, out, plan, **text, tuning=effort.tuning, **run)
    seconds, opening = time.perf_counter() - began, {"device": "cpu", "dtype": "float32"}
    texts = [str(folder / "tail.txt"), str(folder / "mixed.txt")]
    c4, mixed = compare(out, texts, against=DEMO_MODEL, context=256, windows=windows, opening=opening).texts
    found = {"bpw": report["bits_per_weight"], "kl c4": c4.kl, "kl mixed": mixed.kl, "seconds": seconds}
    return {"setting": f"{bits:g} bits, {options}, {run}", **found}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="the settings whose description holds this")
    args = parser.parse_args()
    samples, windows = (16, 4) if args.quick else (512, 64)
    text, rows = bundled("calibration-c4").read_text(encoding="utf-8"), []
    cut = text.index("\n", int(0.93 * len(text)))
    for bits, options, run in SETTINGS:
        if args.only not in f"{bits:g} bits, {options}, {run}":
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "head.txt").write_text(text[:cut], encoding="utf-8")
            (folder / "tail.txt").write_text(text[cut:], encoding="utf-8")
            (folder / "mixed.txt").write_text(bundled("calibration-mixed").read_text(encoding="utf-8"), encoding="utf-8")
            rows.append(measure(bits, options, run, samples=samples, windows=windows, folder=folder))
        print(rows[-1], flush=True)
    publish("pvq on the bundled model, held-out calibration text", rows, args, samples=samples, windows=windows)


if __name__ == "__main__":
    main()
