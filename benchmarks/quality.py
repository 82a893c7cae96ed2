"""Quality on the bundled model against the reference implementations, at equal or fewer bits.

The reference rows are reference implementations' own code, run on this model with the same calibration text (512 windows of 256
tokens) and the same evaluation windows (the first 100 of 256 tokens of each text, float32); they are constants here. Ours are
quantized, reloaded from disk and measured by this run. gap = mean over the texts of ln(perplexity / full-precision perplexity).

    python benchmarks/quality.py --json benchmarks/results/quality.json
"""

import math
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, publish

from voroq.evaluation.compare import compare
from voroq.pipeline.effort import EFFORTS
from voroq.pipeline.plan import make_plan
from voroq.pipeline.run import quantize_model
from voroq.pipeline.text import DEMO_MODEL

TEXTS = ("wikitext2", "books", "c4")
FULL = (39.8151, 38.9336, 93.0934)
REFERENCE = {
    "VPTQ v4 k256": (2.107, (43.43, 43.02, 98.91)),
    "VPTQ v2 k64": (3.043, (40.44, 39.78, 93.59)),
    "GPTQ w3 g128 act-order mse": (3.182, (40.73, 39.78, 93.77)),
    "GPTQ w4 g128 act-order": (4.190, (39.99, 39.19, 93.43)),
}
OURS = {
    "VPTQ v4 k256": [
        ("vptq", 2.107, {}, "fast"),
        ("vptq", 2.107, {}, "balanced"),
        ("vptq", 2.107, {}, "best"),
        ("pvq", 2.107, {}, "fast"),
    ],
    "VPTQ v2 k64": [("vptq", 3.043, {}, "fast"), ("vptq", 3.043, {}, "balanced"), ("pvq", 3.043, {}, "fast")],
    "GPTQ w3 g128 act-order mse": [("gptq", None, {"bits": "3", "group_size": "128"}, "fast"), ("pvq", 3.0, {}, "fast")],
    "GPTQ w4 g128 act-order": [
        ("gptq", None, {"bits": "4", "group_size": "128"}, "fast"),
        ("pvq", 3.25, {}, "fast"),
        ("pvq", 4.0, {}, "fast"),
    ],
}


def gap(perplexities: tuple[float, ...]) -> float:
    return sum(math.log(a / b) for a, b in zip(perplexities, FULL, strict=True)) / len(FULL)


def _row(who: str, setting: str, bits: float, found: tuple[float, ...]) -> dict[str, Any]:
    texts = dict(zip(TEXTS, found, strict=True))
    return {"row": who, "setting": setting, "bpw": bits, **texts, "gap": gap(found), "kl": None, "seconds": None}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="the settings whose name holds this")
    parser.add_argument("--effort", default="", choices=["", *EFFORTS], help="only the rows of this effort")
    parser.add_argument("--method", default="", choices=["", "vptq", "pvq", "gptq"], help="only the rows of this method")
    args = parser.parse_args()
    samples, windows = (32, 10) if args.quick else (512, 100)
    rows = []
    for name, (reference_bits, reference) in REFERENCE.items():
        chosen = [row for row in OURS[name] if args.only in name and args.effort in ("", row[3]) and args.method in ("", row[0])]
        if chosen:
            rows.append(_row("reference", name, reference_bits, reference))
        for method, bits, options, effort in chosen:
            with tempfile.TemporaryDirectory() as folder:
                out, work = str(Path(folder) / "model"), EFFORTS[effort]
                plan = make_plan(method, bits, work.completed(method, options))
                text = {"calibration": "calibration-c4", "samples": samples, "context": 256}
                report = quantize_model(DEMO_MODEL, out, plan, **text, tuning=work.tuning)
                opening = {"device": "cpu", "dtype": "float32"}
                measured = compare(out, list(TEXTS), against=DEMO_MODEL, context=256, windows=windows, opening=opening)
            label = f"{method} --bits {bits}" if bits else f"{method}, the same"
            found = tuple(text.perplexity for text in measured.texts)
            row = _row("voroq", f"{label} --effort {effort}", report["bits_per_weight"], found)
            rows.append({**row, "kl": measured.kl, "seconds": report["seconds"]})
            print(rows[-1], flush=True)
    publish("bundled model, context 256, total bits per weight", rows, args, samples=samples, windows=windows)


if __name__ == "__main__":
    main()
