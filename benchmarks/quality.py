"""Quality on the bundled model against the reference implementations, at equal or fewer bits.

The reference rows are reference implementations' own code, run on this model with the same calibration text (512 windows of 256
tokens) and the same evaluation windows (the first 100 of 256 tokens of each text, float32); they are constants here. Ours are
quantized, reloaded from disk and measured by this run. gap = mean over the texts of ln(perplexity / full-precision perplexity).

    python benchmarks/quality.py --json benchmarks/results/quality.json
"""

import math
import tempfile
from pathlib import Path

from common import arguments, publish

from voroq.evaluation.compare import compare
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
    "VPTQ v4 k256": ("vptq", 2.107, {}),
    "VPTQ v2 k64": ("vptq", 3.043, {}),
    "GPTQ w3 g128 act-order mse": ("gptq", None, {"bits": "3", "group_size": "128"}),
    "GPTQ w4 g128 act-order": ("gptq", None, {"bits": "4", "group_size": "128"}),
}


def gap(perplexities: tuple[float, ...]) -> float:
    return sum(math.log(a / b) for a, b in zip(perplexities, FULL, strict=True)) / len(FULL)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="the settings whose name holds this")
    args = parser.parse_args()
    samples, windows = (32, 10) if args.quick else (512, 100)
    rows = []
    for name, (reference_bits, reference) in REFERENCE.items():
        if args.only not in name:
            continue
        method, bits, options = OURS[name]
        rows.append(dict(row="reference", setting=name, bpw=reference_bits, wikitext2=reference[0], books=reference[1], c4=reference[2],
                         gap=gap(reference), kl=None, seconds=None))  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "model")
            report = quantize_model(
                DEMO_MODEL, out, make_plan(method, bits, options), calibration="calibration-c4", samples=samples, context=256
            )
            measured = compare(
                out, list(TEXTS), against=DEMO_MODEL, context=256, windows=windows, opening={"device": "cpu", "dtype": "float32"}
            )
        label = f"{method} --bits {bits}" if bits else f"{method}, the same"
        found = tuple(text.perplexity for text in measured.texts)
        rows.append(dict(row="voroq", setting=label, bpw=report["bits_per_weight"], wikitext2=found[0], books=found[1],
                         c4=found[2], gap=gap(found), kl=measured.kl, seconds=report["seconds"]))  # fmt: skip
    publish("bundled model, context 256, total bits per weight", rows, args, samples=samples, windows=windows)


if __name__ == "__main__":
    main()
