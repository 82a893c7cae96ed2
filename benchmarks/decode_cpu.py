"""Products with packed weights on the CPU, and tokens per second, beside dense torch and what users would pick instead.

    python benchmarks/decode_cpu.py --json benchmarks/results/decode-cpu.json

Single matrices of real shapes with random codes, at batch 1, 4 and 16, and at 128, as prompts are read; a Llama of the bundled shape,
through `generate`; and one whose blocks have 186 M weights, by calling it token by token, as llama.cpp beside it.
`ms` are the least of several rounds in which all take turns; `ratio` is the time of dense bfloat16 in the same process, over that: above 1
is faster. The peers (official VPTQ in torch, AQLM's CPU kernel, llama.cpp, GPTQModel) live in an environment of their own, which
`make .venv-peers/installed` makes; `benchmarks/peers_cpu.py` runs there, with a dense bfloat16 row of its own to compare with. One that is
not there is named, with the reason. Threads: as many as torch takes (OMP_NUM_THREADS). Where other work runs beside, `--cpu-time` counts
the CPU time of the whole process instead (peers start threads of their own), without the rows through `generate`:

    OMP_NUM_THREADS=1 python benchmarks/decode_cpu.py --cpu-time --shape 14336x4096
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import torch
from common import arguments, in_turns, publish
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from voroq import native
from voroq.codebook.presets import preset
from voroq.evaluation.models import open_model
from voroq.evaluation.speed import copy_bandwidth, measure
from voroq.integrations.decoder import speed_up
from voroq.kernels import matmul
from voroq.layer import QuantLinear
from voroq.packed.base import Spec
from voroq.packed.codebooks import GridForm, PyramidsForm
from voroq.packed.format import bits_per_weight
from voroq.packed.native_format import NativeSpec, Run
from voroq.packed.random import random_packed
from voroq.packed.vptq_format import VptqSpec
from voroq.pipeline.text import DEMO_MODEL
from voroq.quantized import Tile

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
BATCHES = (1, 4, 16)
LONG = 128
"""Rows of x of the prefill rows, which are measured for the first shape, and also with bfloat16 inputs."""
HALF = ", bfloat16 x"
LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
         "vocab_size": 8192, "max_position_embeddings": 512}  # fmt: skip
LLAMA_NAME = "Llama of 186 M"
PROMPT, NEW = 64, 32
Clock = Callable[[], float]
PEERS = Path(".venv-peers/bin/python")


def settings(out: int, columns: int) -> dict[str, Spec]:
    def grid(bits: int) -> Spec:
        return NativeSpec((out, columns), (), (Run(columns // 128, 128, Tile(1, 1), GridForm(bits), True, True),))

    def pyramids(bits: int, tile: Tile) -> Spec:
        return NativeSpec((out, columns), (), (Run(1, columns, tile, PyramidsForm.of(preset(16, 16 * bits)), True, False),))

    return {
        "v8 k256+256": VptqSpec((out, columns), 8, 256, 256, 1, None, False, True),
        "v6 k4096": VptqSpec((out, columns), 6, 4096, None, 1, None, False, True),
        "v8 k65536": VptqSpec((out, columns), 8, 1 << 16, None, 1, None, False, True),
        **{f"grid {bits} bit g128": grid(bits) for bits in (2, 3, 4)},
        **{f"pyramids {bits} bit 16x1": pyramids(bits, Tile(16, 1)) for bits in (2, 3, 4)},
        "pyramids 3 bit 1x16": pyramids(3, Tile(1, 16)),
    }


def matrices(shapes: tuple[tuple[int, int], ...], repeats: int, clock: Clock) -> list[dict]:
    rows = []
    for out, columns in shapes:
        packed = {name: random_packed(spec, torch.bfloat16) for name, spec in settings(out, columns).items()}
        bits = {"dense float32": 32.0, "dense bfloat16": 16.0, **{name: bits_per_weight(p) for name, p in packed.items()}}
        dense = torch.randn(out, columns) / 64
        dense16 = dense.bfloat16()
        for batch in (*BATCHES, LONG) if (out, columns) == shapes[0] else BATCHES:
            x = torch.randn(batch, columns)
            x16 = x.bfloat16()
            works = {"dense float32": partial(torch.matmul, x, dense.T), "dense bfloat16": partial(torch.matmul, x16, dense16.T)}
            works |= {name: partial(matmul, x, p) for name, p in packed.items()}
            if batch == LONG:
                works |= {f"{name}{HALF}": partial(matmul, x16, p) for name, p in packed.items()}
            for name, took in (found := in_turns(works, min(repeats, 2) if batch == LONG else repeats, clock)).items():
                rows.append(row(f"{out} x {columns}", batch, name, bits[name.removesuffix(HALF)], took, found["dense bfloat16"]))
    return rows


def row(what: str, batch: int, name: str, bits: float | None, seconds: float | None, dense: float | None, note: str = "") -> dict:
    ms, ratio = (None, None) if seconds is None else (1000 * seconds, dense / seconds)
    return {"what": what, "batch": batch, "with": name, "bits": bits, "ms": ms, "ratio": ratio, "note": note}


def models(repeats: int, new: int) -> list[dict]:
    """Tokens per second of the bundled shape; ratio is against the bfloat16 model as transformers runs it."""
    opened = {f"dense {dtype}": open_model(DEMO_MODEL, device="cpu", dtype=dtype)[0] for dtype in ("float32", "bfloat16")}
    for name in ("v8 k256+256", "v6 k4096", "pyramids 2 bit 16x1", "pyramids 3 bit 16x1"):
        opened[name] = by_library(filled(open_model(DEMO_MODEL, device="cpu", dtype="float32")[0], name))
    found = measure(opened, batches=(1, 16), prompt=64, new=new, repeats=repeats)
    dense = {speed.batch: speed for speed in found.speeds if speed.model == "dense bfloat16"}
    rows = []
    for speed in found.speeds:
        for kind in ("prefill", "decode"):
            rate, base = getattr(speed, kind), getattr(dense[speed.batch], kind)
            seconds = (1 / rate, 1 / base) if rate and base else (None, None)
            note = "" if rate is None else f"{rate:.0f} tokens/s"
            rows.append(row(f"bundled model, {kind}, ms a token", speed.batch, speed.model, None, *seconds, note))
    return rows


def writing(repeats: int, clock: Clock) -> list[dict]:
    """Seconds of a token of the prompt, and of the fastest step after it, of a model with random weights; all in bfloat16. Steps of all but
    the first two are one call of the library each."""
    names = ("v8 k256+256", "v6 k4096", "grid 2 bit g128", "grid 4 bit g128", "pyramids 2 bit 16x1")
    opened = {"dense bfloat16": random_llama(), f"{names[0]}, steps by torch": filled(random_llama(), names[0])}
    opened |= {"dense bfloat16, steps by the library": by_library(random_llama())}
    opened |= {name: by_library(filled(random_llama(), name)) for name in names}
    bits = {name: stored_bits(model) for name, model in opened.items()}
    best = {name: [float("inf")] * 2 for name in opened}
    for _ in range(repeats):
        for name, model in opened.items():
            best[name] = [min(pair) for pair in zip(best[name], speak(model, clock), strict=True)]
    rows = []
    for name, times in best.items():
        for kind, took, base in zip(("prefill", "decode"), times, best["dense bfloat16"], strict=True):
            rows.append(row(f"{LLAMA_NAME}, {kind}, ms a token", 1, name, bits[name], took, base, f"{1 / took:.0f} tokens/s"))
    return rows


def by_library(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, with steps of one token in one call. Raises RuntimeError where it has to go on as before."""
    if why := speed_up(model):
        raise RuntimeError(f"steps stay with torch, as {why}")
    return model


def stored_bits(model: torch.nn.Module) -> float:
    """Per weight of the linears in the blocks."""
    packed = [module.packed() for module in model.modules() if isinstance(module, QuantLinear)]
    weights = [prod(p.spec.shape) for p in packed]
    return sum(bits_per_weight(p) * n for p, n in zip(packed, weights, strict=True)) / sum(weights) if packed else 16.0


def random_llama() -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16().eval()


@torch.inference_mode()
def speak(model: torch.nn.Module, clock: Clock) -> tuple[float, float]:
    """Seconds per token of a prompt of random tokens, and of the fastest token after it."""
    tokens = torch.randint(0, LLAMA["vocab_size"], (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    cache, took = DynamicCache(), []
    for part in (tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1)):
        begun = clock()
        model(part, past_key_values=cache, logits_to_keep=1)
        took.append(clock() - begun)
    return took[0] / PROMPT, min(took[1:])


def filled(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """`model` with random codes in all linears of its blocks."""
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in path:
            spec = settings(*module.weight.shape)[name]
            model.set_submodule(path, QuantLinear.holding(random_packed(spec, torch.float32)))
    return model


def peers(shapes: tuple[tuple[int, int], ...], repeats: int, cpu_time: bool) -> list[dict]:
    if not PEERS.exists():
        return [row("peers", 0, "all", None, None, None, f"{PEERS} is missing: make .venv-peers/installed")]
    job = {"shapes": shapes, "batches": BATCHES, "repeats": min(repeats, 3), "cpu_time": cpu_time}
    job |= {"what": LLAMA_NAME, "llama": LLAMA, "prompt": PROMPT, "new": NEW}
    held = {name: str(torch.get_num_threads()) for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")}  # numba asks for every core else
    command = [PEERS, Path(__file__).with_name("peers_cpu.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | held)
    if done.returncode:
        why = f"killed by signal {-done.returncode}" if done.returncode < 0 else done.stderr.strip().splitlines()[-1]
        return [row("peers", 0, "all", None, None, None, why)]
    return [row(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of the process; needs OMP_NUM_THREADS=1")
    parser.add_argument("--shape", action="append", metavar="OUTxIN", help="instead of the three shapes; repeatable")
    args = parser.parse_args()
    if args.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time adds up all threads, so there must be one: set OMP_NUM_THREADS=1")
    shapes, repeats = (((512, 512),), 1) if args.quick else (SHAPES, 5)
    if args.shape:
        shapes = tuple(tuple(int(side) for side in shape.split("x")) for shape in args.shape)
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = matrices(shapes, repeats, clock)
    rows += [] if args.cpu_time else models(repeats, 4 if args.quick else 32)
    rows += writing(min(repeats, 2), clock) + peers(shapes, repeats, args.cpu_time)
    copied = copy_bandwidth(torch.device("cpu"))
    publish("decoding on the CPU", rows, args, kernels=native.isas(), copy_bandwidth=copied, cpu_time=args.cpu_time)


if __name__ == "__main__":
    main()
