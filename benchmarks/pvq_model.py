"""Pyramids on the bundled model without calibration, and with quantized caches and inputs.

    python benchmarks/pvq_model.py --json benchmarks/results/pvq_model.json

`choice`: weights quantized while loading, KL to the original on calibration text, which data-free quantization has never seen; settings are
judged here. `free`: the same on the evaluation texts, 100 windows of 256 tokens; `gap` is the mean of ln(perplexity / full precision's).
`cache` and `inputs`: fewer windows, KL on the three texts together, the full-precision perplexity on the same windows beside it. A
cache has its `recent` newest tokens exact and reads a window 16 tokens at a time; `bits` of a cache count scales, of weights everything.
"""

import math
import tempfile
from functools import partial
from typing import Any

import torch
from common import arguments, publish
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from voroq.activations import Activations
from voroq.codebook.rows import RowCode
from voroq.evaluation.cached import Cached
from voroq.evaluation.perplexity import Evaluation, evaluate, pooled
from voroq.evaluation.texts import evaluation_windows
from voroq.front import round_inputs
from voroq.methods import PVQ, RTN
from voroq.pipeline.calibration import calibration_windows
from voroq.pipeline.text import DEMO_MODEL
from voroq.report.inspect import inspect_folder
from voroq.streaming import VoroqConfig

TEXTS = ("wikitext2", "books", "c4")
FULL = (39.8151, 38.9336, 93.0934)
CHOICE = {f"{b:g} bits, rotation={r}": PVQ(bits=b, rotation=r) for b in (3.0, 4.0) for r in ("input", "none", "both")}
CHOICE |= {"4 bits, along=input": PVQ(bits=4.0, along="input"), "4 bits, sweeps=1": PVQ(bits=4.0, sweeps=1), "rtn 4 bits g128": RTN(bits=4)}
CACHES = {
    "exact": ((2.5, 0), (3.0, 0), (3.5, 0), (4.0, 0), (2.5, 32), (3.0, 32), (4.0, 32)),
    "pvq 4 bits": ((3.0, 32), (4.0, 32)),
}
"""Bits and recent tokens, for each kind of weights."""


def streamed(**order: Any) -> tuple[nn.Module, float]:
    """The model quantized while loading in float16, saved, and loaded again in float32; its bits per weight as stored."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=VoroqConfig(**order), dtype=torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        bits = inspect_folder(folder).bits_per_weight
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), bits


def row(part: str, setting: str, bits: float | None, found: list[Evaluation], full: list[float] | tuple[float, ...]) -> dict[str, Any]:
    gap = sum(math.log(e.perplexity / f) for e, f in zip(found, full, strict=True)) / len(found)
    kl = pooled(found).kl
    print(part, setting, bits, [e.perplexity for e in found], gap, kl, flush=True)
    texts = dict(zip(TEXTS, (e.perplexity for e in found), strict=False)) if len(found) == 3 else dict.fromkeys(TEXTS)
    return {"part": part, "setting": setting, "bits": bits, **texts, "gap": gap, "kl": kl}


def choice(original: nn.Module, tokenizer: Any, windows: int) -> list[dict[str, Any]]:
    held = [calibration_windows(tokenizer, f"calibration-{n}", samples=windows, context=256, seed=5).windows for n in ("c4", "mixed")]
    rows = []
    for name, method in CHOICE.items():
        model, bits = streamed(method=method)
        model = model.dequantize()
        found = [evaluate(model, tokens, against=original) for tokens in held]
        rows.append(row("choice", name, bits, found, [e.perplexity_against for e in found]))
    return rows


def free(texts: list[torch.Tensor]) -> list[dict[str, Any]]:
    rows = []
    for bits in (4.0, 3.25, 3.0):
        model, stored = streamed(method="pvq", bits=bits)
        model = model.dequantize()
        rows.append(row("free", f"pvq --bits {bits:g} while loading", stored, [evaluate(model, tokens) for tokens in texts], FULL))
    return rows


def cache(original: nn.Module, texts: list[torch.Tensor]) -> list[dict[str, Any]]:
    rows, quantized = [], None
    for weights in CACHES:
        for bits, recent in CACHES[weights]:
            if weights != "exact" and quantized is None:
                quantized = streamed(method="pvq", bits=4.0)[0].dequantize()
            model = original if weights == "exact" else quantized
            found = [evaluate(model, tokens, against=original, through=Cached(bits, recent)) for tokens in texts]
            name = f"weights {weights}, cache {bits:g} bits, {recent} recent"
            rows.append(row("cache", name, RowCode(64, bits).stored_bits, found, [e.perplexity_against for e in found]))
    return rows


def inputs(original: nn.Module, texts: list[torch.Tensor]) -> list[dict[str, Any]]:
    model, bits = streamed(method="pvq", bits=4.0)
    rows = []
    for activations in (None, *(Activations(b, kind) for b in (8, 6, 5, 4) for kind in ("integers", "pulses"))):
        round_inputs(model, activations)
        found = [evaluate(model, tokens, against=original) for tokens in texts]
        name = "as they are" if activations is None else f"{activations.kind} of {activations.bits} bits"
        rows.append(row("inputs", f"weights pvq 4 bits, inputs {name}", bits, found, [e.perplexity_against for e in found]))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", default="", choices=["", "choice", "free", "cache", "inputs"], help="only this part")
    parser.add_argument("--windows", type=int, default=30, help="of each text, for cache and inputs")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    original = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    many, few = (2, 2) if args.quick else (100, args.windows)
    texts = {n: [evaluation_windows(tokenizer, t, context=256, windows=n) for t in TEXTS] for n in (many, few)}
    works = {
        "free": partial(free, texts[many]),
        "cache": partial(cache, original, texts[few]),
        "inputs": partial(inputs, original, texts[few]),
        "choice": partial(choice, original, tokenizer, 2 if args.quick else 16),
    }
    rows = [found for name, work in works.items() if args.part in ("", name) for found in work()]
    publish("pyramids on the bundled model, no calibration", rows, args, windows=few)


if __name__ == "__main__":
    main()
