"""What block-wise tuning does for the KL divergence on held-out calibration text; evaluation text is not touched.

    python benchmarks/tuning.py --json benchmarks/results/tuning.json
"""

import tempfile
import time
from pathlib import Path

import torch
from common import arguments, publish
from transformers import AutoModelForCausalLM, AutoTokenizer

import voroq
from voroq.evaluation.perplexity import evaluate
from voroq.pipeline.calibration import calibration_windows
from voroq.pipeline.plan import make_plan
from voroq.pipeline.text import DEMO_MODEL, bundled, read_text
from voroq.tuning.loop import Tuning

CONTEXT = 256
SHARE = 0.93
"""Of calibration-c4 what is calibrated on; the divergence is measured on the rest."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=float, default=2.106)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    samples, steps = (16, 4) if args.quick else (512, args.steps)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    original = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        text = read_text(bundled("calibration-c4"))
        cut = text.index("\n", int(len(text) * SHARE))
        parts = {name: Path(work) / f"{name}.txt" for name in ("train", "held")}
        parts["train"].write_text(text[:cut], encoding="utf-8")
        parts["held"].write_text(text[cut:], encoding="utf-8")
        texts = {"c4": (parts["held"], 8 if args.quick else 96), "mixed": ("calibration-mixed", 8 if args.quick else 64)}
        windows = {name: calibration_windows(tokenizer, t, samples=n, context=CONTEXT, seed=5).windows for name, (t, n) in texts.items()}
        for mode in ("parallel", "sequential"):
            for tuned in (0, steps):
                out, began = Path(work) / f"{mode}-{tuned}", time.perf_counter()
                report = voroq.quantize_model(
                    DEMO_MODEL, out, make_plan("vptq", args.bits, {}), calibration=parts["train"], samples=samples, context=CONTEXT,
                    mode=mode, block_tuning=Tuning(steps=tuned, samples=samples),
                )  # fmt: skip
                seconds = time.perf_counter() - began
                student, _ = voroq.load(out, dtype=torch.float32, dequantize=True)
                found = {f"kl {name}": evaluate(student, w, against=original).kl for name, w in windows.items()}
                rows.append({"mode": mode, "steps": tuned, "bpw": report["bits_per_weight"], **found, "seconds": seconds})
    publish(f"block-wise tuning, VPTQ on the bundled model, {samples} windows of {CONTEXT}", rows, args)


if __name__ == "__main__":
    main()
