"""Quality on the bundled model against the reference implementations, at equal or fewer bits.

The reference rows are reference implementations' own code, run on this model with the same calibration text (512 windows of 256
tokens) and the same evaluation windows (the first 100 of 256 tokens of each text, float32); they are constants here. Ours are
quantized, reloaded from disk and measured by this run. gap = mean over the texts of ln(perplexity / full-precision perplexity).

    python benchmarks/quality.py --json benchmarks/results/quality.json
"""

from bundled import measure, row
from common import arguments, publish

from voroq.pipeline.effort import EFFORTS
from voroq.pipeline.plan import make_plan

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
        ("pvq", 2.107, {}, "balanced"),
    ],
    "VPTQ v2 k64": [
        ("vptq", 3.043, {}, "fast"),
        ("vptq", 3.043, {}, "balanced"),
        ("vptq", 3.043, {}, "best"),
        ("pvq", 3.043, {}, "fast"),
        ("pvq", 3.043, {}, "balanced"),
    ],
    "GPTQ w3 g128 act-order mse": [("gptq", None, {"bits": "3", "group_size": "128"}, "fast"), ("pvq", 3.0, {}, "fast")],
    "GPTQ w4 g128 act-order": [
        ("gptq", None, {"bits": "4", "group_size": "128"}, "fast"),
        ("pvq", 3.25, {}, "fast"),
        ("pvq", 4.0, {}, "fast"),
    ],
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="the settings whose name holds this")
    parser.add_argument("--effort", default="", choices=["", *EFFORTS], help="only the rows of this effort")
    parser.add_argument("--method", default="", choices=["", "vptq", "pvq", "gptq"], help="only the rows of this method")
    parser.add_argument("--calibration", action="append", metavar="TEXT", help="another text than the reference's; repeatable")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn")
    args = parser.parse_args()
    calibration = args.calibration or ["calibration-c4"]
    samples, windows = (32, 10) if args.quick else (None, 100)  # None: the effort's own, 512 but for best
    rows = []
    for name, (reference_bits, reference) in REFERENCE.items():
        chosen = [own for own in OURS[name] if args.only in name and args.effort in ("", own[3]) and args.method in ("", own[0])]
        if chosen:
            rows.append(row("reference", name, reference_bits, reference))
        for method, bits, options, effort in chosen:
            label = f"{method} --bits {bits}" if bits else f"{method}, the same"
            work = EFFORTS[effort]
            plan = make_plan(method, bits, work.completed(method, options))
            label += f" --effort {effort}" + "".join(f" --calibration {text}" for text in args.calibration or [])
            label += f" --seed {args.seed}" if args.seed else ""
            rows.append(measure(label, plan, work, samples=samples, windows=windows, calibration=calibration, seed=args.seed))
    publish(f"bundled model, {' + '.join(calibration)}, context 256, total bits per weight", rows, args, samples=samples, windows=windows)


if __name__ == "__main__":
    main()
