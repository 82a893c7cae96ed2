"""Products of one matrix with few and many inputs on a GPU: our Triton kernels, cuBLAS; AQLM, gemlite, official VPTQ where they import.

Every contender gets copies of its weights that together exceed the L2 cache, and one CUDA graph that multiplies with each copy once, as a
model does; the graph is replayed and timed by events. The ceiling is the bandwidth of a copy, measured in the same run; `of copy` is the
share of it that reading the stored bytes reached. `error` is the largest difference to the reference in float32, relative to the largest
output.

    python benchmarks/gpu.py                       all, at most 9 minutes; writes benchmarks/results/gpu-DEVICE-DATE.json
    python benchmarks/gpu.py --tune --only k4096   tiling by tiling, the best kept in voroq/kernels/triton_configs.json
    python benchmarks/gpu.py --together            q, k and v, gate and up: one by one and together, in a graph and from Python

Without a GPU it runs tiny shapes through Triton's interpreter, to see that it runs; its times mean nothing then.
"""

import copy
import datetime
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from common import arguments, publish
from torch import nn

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["VOROQ_KERNEL"] = "triton"

from voroq.codebook.presets import preset  # noqa: E402
from voroq.integrations.siblings import join  # noqa: E402
from voroq.kernels import triton_form, triton_kernel, triton_plan  # noqa: E402
from voroq.layer import QuantLinear  # noqa: E402
from voroq.packed.base import Spec  # noqa: E402
from voroq.packed.codebooks import GridForm, PyramidsForm  # noqa: E402
from voroq.packed.format import bits_per_weight  # noqa: E402
from voroq.packed.native_format import NativeSpec, Run  # noqa: E402
from voroq.packed.random import random_packed  # noqa: E402
from voroq.packed.vptq_format import VptqSpec  # noqa: E402
from voroq.quantized import Tile  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
SECONDS = 8.5 * 60
"""After these no new measurement starts."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Contender:
    name: str
    layer: nn.Module
    bits: float
    dtype: torch.dtype = torch.float16
    error: Callable[[torch.Tensor], float] | None = None


def specs(out: int, columns: int) -> dict[str, Spec]:
    group = min(128, columns)
    found: dict[str, Spec] = {
        "v8 k256+256": VptqSpec((out, columns), 8, 256, 256, 1, None, True, True),
        "v6 k4096": VptqSpec((out, columns), 6, 4096, None, 1, None, True, True),
        "v8 k65536": VptqSpec((out, columns), 8, 1 << 16, None, 1, None, True, True),
    }
    for bits in (2, 3, 4):
        run = Run(columns // group, group, Tile(1, 1), GridForm(bits), True, True)
        found[f"grid {bits} bit g128"] = NativeSpec((out, columns), (), (run,))
    for bits in (32, 48):
        form = PyramidsForm(16, bits, preset(16, bits).pulses)
        found[f"pyramids {bits // 16} bit"] = NativeSpec((out, columns), (), (Run(1, columns, Tile(16, 1), form, True, False),))
    return found


def ours(spec: Spec, name: str) -> Contender:
    packed = random_packed(spec, torch.float16)
    layer = QuantLinear.holding(packed).to(DEVICE)
    dense = layer.dequantize(torch.float32).weight.detach()

    def error(x: torch.Tensor) -> float:
        expected = x.float() @ dense.T
        return float((layer(x).float() - expected).abs().max() / expected.abs().max())

    return Contender(f"voroq {name}", layer, bits_per_weight(packed), error=error)


def dense(out: int, columns: int, dtype: torch.dtype) -> Contender:
    layer = nn.Linear(columns, out, bias=False, dtype=dtype, device=DEVICE).requires_grad_(False)
    return Contender(f"cuBLAS {str(dtype).removeprefix('torch.')}" if CUDA else f"torch {dtype}", layer, 16.0, dtype)


def aqlm(out: int, columns: int) -> Iterator[Contender]:
    from aqlm import QuantizedLinear

    for tables, bits in ((2, 8), (1, 16)):
        layer = QuantizedLinear(columns, out, 8, 1, tables, bits, bias=False, device=DEVICE, dtype=torch.float16)
        nn.init.normal_(layer.codebooks), nn.init.ones_(layer.scales)
        top = 1 << bits - 1
        layer.codes.data.copy_(torch.randint(-top, top, layer.codes.shape, device=DEVICE))
        yield Contender(f"AQLM {tables}x{bits}", layer, tables * bits / 8)


def gemlite(out: int, columns: int) -> Iterator[Contender]:
    from gemlite.helper import A16Wn

    for bits in (2, 4):
        codes = torch.randint(0, 1 << bits, (out, columns), dtype=torch.uint8, device=DEVICE)
        scales, zeros = (torch.full((out * columns // 128, 1), value, device=DEVICE, dtype=torch.float16) for value in (0.01, 1.5))
        layer = A16Wn(device=DEVICE, dtype=torch.float16).from_weights(codes, scales, zeros, bits, 128)
        yield Contender(f"gemlite {bits} bit g128", layer, bits + 32 / 128)


def official(out: int, columns: int) -> Iterator[Contender]:
    import vptq

    for name, spec in specs(out, columns).items():
        if isinstance(spec, VptqSpec):
            layer = vptq.VQuantLinear(**spec.to_json(), enable_proxy_error=False, dtype=torch.float16)
            layer.load_state_dict(random_packed(spec, torch.float16).tensors, strict=True)
            yield Contender(f"official VPTQ {name}", layer.to(DEVICE), bits_per_weight(random_packed(spec, torch.float16)))


PEERS = {"aqlm": aqlm, "gemlite": gemlite, "vptq": official}


def contenders(out: int, columns: int, only: str, missing: dict[str, str]) -> Iterator[Contender]:
    """Ours and cuBLAS, then the peers that import; why others do not comes into `missing`."""
    yield dense(out, columns, torch.float16)
    yield dense(out, columns, torch.bfloat16)
    for name, spec in specs(out, columns).items():
        if re.search(only, name):
            yield ours(spec, name)
    for package, made in PEERS.items():
        if not CUDA or find_spec(package) is None:
            missing[package] = "no GPU" if not CUDA else "not installed"
            continue
        try:
            yield from made(out, columns)
        except Exception as problem:  # of foreign code anything may come; the run goes on and says so
            missing[package] = f"{type(problem).__name__}: {problem}"[:200]


def microseconds(layer: nn.Module, x: torch.Tensor) -> float:
    """Time of one product: median over replays of a graph that goes through copies of the layer once."""
    if not CUDA:
        start = time.perf_counter()
        layer(x)
        return 1e6 * (time.perf_counter() - start)
    size = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [layer, *[copy.deepcopy(layer) for _ in range(min(40, 3 * cache // max(size, 1) + 1))]]
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in copies:
            each(x)
    return replayed(graph) / len(copies)


def replayed(graph: torch.cuda.CUDAGraph, seconds: float = 0.3) -> float:
    """Median time of a replay, in microseconds."""
    times, until = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes read and written per second by copying one large tensor."""
    source = torch.zeros((1 << 28 if CUDA else 1 << 24), dtype=torch.int32, device=DEVICE)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / min(times)


def measure(shapes: list[tuple[int, int]], batches: list[int], only: str, until: float) -> tuple[list[dict], dict]:
    bandwidth, missing, rows = copy_bandwidth(), {}, []
    for out, columns in shapes:
        plain: dict[int, float] = {}
        for each in contenders(out, columns, only, missing):
            for batch in batches:
                if time.perf_counter() > until:
                    missing["time"] = f"stopped at {out} x {columns}, {each.name}, batch {batch}"
                    return rows, {"copy_bandwidth": bandwidth, "missing": missing}
                x = torch.randn(batch, columns, device=DEVICE, dtype=each.dtype)
                try:
                    took = microseconds(each.layer, x)
                    error = each.error(x) if each.error else None
                except Exception as problem:  # as above; our own kernels must show their failures too
                    missing[f"{each.name}, {out} x {columns}, batch {batch}"] = f"{type(problem).__name__}: {problem}"[:200]
                    continue
                plain.setdefault(batch, took)
                share = each.bits / 8 * out * columns / bandwidth * 1e6 / took
                rows.append({"matrix": f"{out} x {columns}", "what": each.name, "bits": each.bits, "batch": batch, "us": took,
                             "fp16 / this": plain[batch] / took, "of copy": share, "error": error})  # fmt: skip
                print(*rows[-1].values(), file=sys.stderr, flush=True)
    return rows, {"copy_bandwidth": bandwidth, "missing": missing}


def tune(shapes: list[tuple[int, int]], batches: list[int], only: str, until: float) -> list[dict]:
    """From the rule's tiling, one number at a time halved or doubled while that is faster. The best goes into CONFIGS."""
    rows, found, device = [], json.loads(triton_form.CONFIGS.read_text(encoding="utf-8")), triton_kernel._device(torch.device(DEVICE, 0))
    for (out, columns), batch in ((shape, batch) for shape in shapes for batch in batches):
        for name, spec in specs(out, columns).items():
            if not re.search(only, name) or time.perf_counter() > until:
                continue
            layer, x = QuantLinear.holding(random_packed(spec, torch.float16)).to(DEVICE), torch.randn(batch, columns, device=DEVICE).half()
            form = triton_form.pieces(spec)[0].form
            start = triton_form.tiling(form, batch, *device)
            best, least = climb(start, lambda cut, layer=layer, x=x: timed(layer, x, cut), until)
            found["devices"].setdefault(device[0], {})[triton_form.shape_key(form, batch)] = list(best)
            rows.append({"matrix": f"{out} x {columns}", "what": name, "batch": batch, "us": least, "tiling": str(tuple(best)),
                         "before": str(tuple(start))})  # fmt: skip
            print(*rows[-1].values(), file=sys.stderr, flush=True)
    if CUDA:
        triton_form.CONFIGS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return rows


class Several(nn.Module):
    """Linears of one input, one by one or `together` as siblings in a model; copies stay what they are."""

    def __init__(self, layers: list[nn.Module], together: bool) -> None:
        super().__init__()
        self.layers, self.together = nn.ModuleList(layers), together
        if together:
            join(tuple(layers))

    def __deepcopy__(self, memo: dict) -> "Several":
        return Several([copy.deepcopy(layer, memo) for layer in self.layers], self.together)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def measure_together(groups: dict[str, tuple[list[int], int]], batches: list[int], only: str, until: float) -> list[dict]:
    """For every group of linears (rows each, columns): dense, ours one by one, ours together."""
    rows, dtype = [], torch.float16 if CUDA else torch.float32
    for group, (outs, columns) in groups.items():
        contenders = {"dense": Several([dense(out, columns, dtype).layer for out in outs], False)}
        for name in specs(outs[0], columns):
            if re.search(only, name):
                layers = [QuantLinear.holding(random_packed(specs(out, columns)[name], torch.float16)).to(DEVICE) for out in outs]
                contenders |= {name: Several(copy.deepcopy(layers), False), f"{name}, together": Several(layers, True)}
        for batch in batches:
            x, alone = torch.randn(batch, columns, device=DEVICE, dtype=dtype), {}
            for name, several in contenders.items():
                if time.perf_counter() > until:
                    return rows
                expected = alone.setdefault(name.removesuffix(", together"), several(x))
                same = all(map(torch.equal, several(x), expected))
                rows.append({"matrices": f"{group}: {'+'.join(map(str, outs))} x {columns}", "what": name, "batch": batch,
                             "us": microseconds(several, x), "us from Python": from_python(several, x), "same bits": same})  # fmt: skip
                print(*rows[-1].values(), file=sys.stderr, flush=True)
    return rows


def from_python(layer: nn.Module, x: torch.Tensor) -> float:
    """Time of one product without a graph, one after the other: what it takes to launch is in it."""
    times = 200 if CUDA else 1
    for _ in range(times):
        layer(x)
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        layer(x)
    if CUDA:
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / times


def climb(start: triton_form.Tiling, cost: Callable, until: float) -> tuple[triton_form.Tiling, float]:
    best, least, moved = start, cost(start), True
    while moved:
        moved = False
        for name in ("rows", "along", "splits", "warps", "stages"):
            for factor in (2, 0.5):
                value = int(getattr(best, name) * factor)
                if value < 1 or (name == "warps" and value > 16) or time.perf_counter() > until:
                    continue
                tried = best._replace(**{name: value})
                took = cost(tried)
                if took < 0.99 * least:
                    best, least, moved = tried, took, True
    return best, least


def timed(layer: nn.Module, x: torch.Tensor, cut: triton_form.Tiling) -> float:
    """Infinite where the kernel does not compile or start: too few words for tensor cores, too much memory."""
    own = triton_plan.tiling
    triton_plan.tiling = lambda *_: cut
    triton_plan.plan.cache_clear()
    try:
        return microseconds(layer, x)
    except Exception as problem:  # of the compiler anything may come
        print(f"{tuple(cut)}: {type(problem).__name__}", file=sys.stderr)
        return float("inf")
    finally:
        triton_plan.tiling = own
        triton_plan.plan.cache_clear()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="of our settings, those whose name matches")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tune", action="store_true", help="search tilings instead, and keep the best")
    what.add_argument("--together", action="store_true", help="measure linears that read one input instead, one by one and together")
    args = parser.parse_args()
    name = torch.cuda.get_device_name(0) if CUDA else "interpreter"
    if args.json is None and CUDA:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        args.json = RESULTS / f"gpu-{slug}-{datetime.date.today()}{'-tuning' if args.tune else '-together' if args.together else ''}.json"
    shapes, batches = [(14336, 4096), (4096, 14336), (4096, 4096)], [1, 4, 16, 64, 2048]
    if args.quick:
        shapes, batches = shapes[:1], [1, 16]
    if not CUDA:
        shapes, batches = [(48, 64)], [1, 5]
    groups = {"q, k, v": ([4096, 1024, 1024], 4096), "gate, up": ([14336, 14336], 4096)} if CUDA else {"q, k, v": ([48, 24, 24], 64)}
    until, more = time.perf_counter() + SECONDS, {}
    with torch.no_grad():
        if args.tune:
            rows = tune(shapes, batches, args.only, until)
        elif args.together:
            rows = measure_together(groups, [batch for batch in batches if batch <= 16], args.only, until)
        else:
            rows, more = measure(shapes, batches, args.only, until)
    import triton

    subject = "Linears of one input" if args.together else "One matrix"
    publish(f"{subject} on {name}", rows, args, device=name, triton=triton.__version__, **more)
    for what, why in more.get("missing", {}).items():
        print(f"not measured: {what}: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
