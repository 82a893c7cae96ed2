"""Time and peak memory of loading an 8B-shaped checkpoint, against the time safetensors needs to read the same bytes.

Random blocks of true size (hidden 4096, inner 14336, 32 heads, 8 key-value heads; v = 8, k = 65536, r = 256, normalisation and
permutation) in one shard each, and an outer shard (a vocabulary of 32768). 32 blocks are the whole model; fewer show what is fixed cost.
Every run is a process of its own. `cold` files were dropped from the system's cache before each run, so all wait for the disk; `warm`
ones were just read, and what remains is memory speed against the fixed cost of building a model in transformers:

* read: safetensors reads every tensor of every shard into memory of its own (`safe_open(..., backend="pread")`);
* voroq: `voroq.load`, which checks names, shapes, codes, permutations and finite numbers on the way;
* map, to know what lies below both: `safetensors.torch.load_file`, which copies nothing, but hands out pages of the system's cache.

`ratio` compares voroq with read: "the time safetensors needs to read the same bytes". `map_ratio` compares it with map; from a warm cache
no loader that builds a model and looks at values comes near 1 there, for next to nothing is done to the bytes. voroq's tensors are
mapped, too, and their bytes come in when they are touched, so all three end with a pass over every tensor, which is counted; `load_s` is
voroq's time before that. `cpu_ratio` is `ratio` in seconds of processor time, which other work on the machine moves less. The time of
imports is not counted; the peak is of the resident set (mapped files included) less what imports take. Linux only.

    python benchmarks/load.py --json benchmarks/results/load.json
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import arguments, publish
from transformers import LlamaConfig

from voroq.packed.base import Role, Stored, as_int16
from voroq.packed.checkpoint import quantization_config
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.vptq_format import VptqSpec
from voroq.pipeline.text import DEMO_MODEL

RUN = """
import json, sys, time
from pathlib import Path
import torch, voroq
from safetensors import safe_open
from safetensors.torch import load_file
from voroq.pipeline.memory import peak_memory
import transformers.models.llama.modeling_llama
import accelerate
voroq.load
torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
base = peak_memory()["rss"]
reader, folder = sys.argv[1:]
shards, tensors = sorted(Path(folder).glob("*.safetensors")), {}
began, cpu = time.perf_counter(), time.process_time()
if reader == "map":
    for shard in shards:
        tensors.update(load_file(shard))
elif reader == "read":
    for shard in shards:
        with safe_open(shard, framework="pt", backend="pread") as file:
            tensors.update((name, file.get_tensor(name)) for name in file.keys())
else:
    model, tokenizer = voroq.load(folder, device="cpu")
    tensors = model.state_dict()
loaded = time.perf_counter() - began
for tensor in tensors.values():
    tensor.reshape(-1).view(torch.uint8).view(-1)[: tensor.nbytes // 8 * 8].view(torch.int64).sum()
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
print(json.dumps({"loaded": loaded, "seconds": seconds, "cpu": cpu, "peak": peak_memory()["rss"] - base}))
"""
READERS = ("read", "map", "voroq")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="+", default=(2, 8, 32))
    args = parser.parse_args()
    counts = (1, 2) if args.quick else args.blocks
    shape = {"hidden": 512, "inner": 1024, "k": 4096} if args.quick else {"hidden": 4096, "inner": 14336, "k": 65536}
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count, **shape)
            sizes = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
            for cache in ("warm", "cold"):
                runs = {reader: [] for reader in READERS}
                for _ in range(args.repeats):  # in turn, so that what else the machine does meets all
                    for reader, done in runs.items():
                        prepare(Path(folder), cache)
                        done.append(read(reader, folder))
                rows.append({"blocks": str(count), "cache": cache} | row(runs, sum(sizes), max(sizes)))
    publish(f"loading, hidden {shape['hidden']}, inner {shape['inner']}, median of {args.repeats}", rows, args)


def row(runs: dict[str, list[dict[str, float]]], size: int, shard: int) -> dict[str, float]:
    read, mapped, ours = ({key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]} for name in READERS)
    return {"files_gb": size / 1e9, "read_s": read["seconds"], "map_s": mapped["seconds"], "load_s": ours["loaded"],
            "voroq_s": ours["seconds"], "ratio": ours["seconds"] / read["seconds"], "map_ratio": ours["seconds"] / mapped["seconds"],
            "cpu_ratio": ours["cpu"] / read["cpu"], "peak_gb": ours["peak"] / 1e9, "files_and_shard_gb": (size + shard) / 1e9,
            "memory_ratio": ours["peak"] / (size + shard)}  # fmt: skip


def prepare(folder: Path, cache: str) -> None:
    """Bring the files into the system's cache, or drop them from it."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def read(reader: str, folder: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", RUN, reader, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def make(folder: Path, blocks: int, *, hidden: int, inner: int, k: int) -> None:
    """A Llama of `blocks` blocks with random codes and tables, one shard per block, as the pipeline writes it."""
    heads, vocabulary, narrow = hidden // 128, 8 * hidden, hidden // 4
    linears = {**dict.fromkeys(("q_proj", "o_proj"), (hidden, hidden)), **dict.fromkeys(("k_proj", "v_proj"), (narrow, hidden))}
    attention = {f"self_attn.{name}": shape for name, shape in linears.items()}
    mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    rng = torch.Generator().manual_seed(0)
    specs, weights = {}, {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        write_safetensors(folder / name, [Entry.of(*item) for item in tensors.items()], {"format": "pt"})
        weights.update(dict.fromkeys(tensors, name))

    outer = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    write(0, {name: noise(shape, rng) for name, shape in outer.items()} | {"model.norm.weight": noise((hidden,), rng)})
    for block in range(blocks):
        at, tensors = f"model.layers.{block}", {}
        for name, shape in (attention | mlp).items():
            spec = VptqSpec(shape, 8, k, 256, 1, None, norm=True, perm=True)
            specs[f"{at}.{name}"] = spec
            tensors |= {f"{at}.{name}.{stored.name}": fill(stored, rng) for stored in spec.layout()}
        norms = ("input_layernorm", "post_attention_layernorm")
        write(block + 1, tensors | {f"{at}.{norm}.weight": noise((hidden,), rng) for norm in norms})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weights})
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
                         num_key_value_heads=heads // 4, vocab_size=vocabulary, architectures=["LlamaForCausalLM"])  # fmt: skip
    write_json(folder / "config.json", config.to_dict() | {"dtype": "bfloat16", "quantization_config": quantization_config("vptq", specs)})
    for file in Path(DEMO_MODEL).glob("tokenizer*"):
        shutil.copy(file, folder)


def noise(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=rng)


def fill(stored: Stored, rng: torch.Generator) -> torch.Tensor:
    if stored.real:
        return noise(stored.shape, rng)
    if stored.role is Role.PERM:
        return as_int16(torch.randperm(stored.shape[0], generator=rng))
    return torch.randint(-(2**31), 2**31, stored.shape, dtype=torch.int32, generator=rng)


if __name__ == "__main__":
    main()
