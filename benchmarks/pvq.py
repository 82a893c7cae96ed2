"""Pyramids by themselves: error on Gaussians, loss under synthetic Hessians, time of coding.

    python benchmarks/pvq.py --json benchmarks/results/pvq.json

`gaussian`: mean squared error of 2^21 unit Gaussians; `spec` is the best that was known before, `paper` the gain-shape form in as
many bits. `hessian`: eigenvalues i^-a in random directions, 256 x 256 Gaussian weights; decibels of proxy loss against rounding to nearest.
`spec` is what an earlier study measured on other draws (input: metric search; output: exact feedback; then with 3 or 2 sweeps), and means
something only for the full size; ours is the mean of `DRAWS`, the note has the best and the worst. `time`: nanoseconds per weight on
one thread, of the library of CPU kernels and of torch; `spec` is the limit that was set.
`product`: nanoseconds per weight of y = x w^T for a 2048 x 2048 matrix, from the numbers, from integers spelled out when loading, and
dense, in turns in one process; `bits` in the note are per weight in memory.
The model's rows are in `benchmarks/quality.py --method pvq`.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from common import arguments, in_turns, publish

from voroq import native
from voroq.codebook.gain_shape import gain_shape
from voroq.codebook.presets import distortion, preset, widths
from voroq.codebook.pyramid import Pyramids
from voroq.kernels import cpu, matmul
from voroq.methods.pvq import PVQ
from voroq.moments import Moments
from voroq.numerics.linalg import proxy_loss
from voroq.packed.expand import expanded
from voroq.packed.format import bits_per_weight, pack
from voroq.quantized import Band, Quantized, Tile
from voroq.transform.chain import Chain

BEST_KNOWN = {32: 0.0974, 40: 0.0487, 48: 0.0242, 52: 0.0176, 56: 0.0124, 64: 0.0062}
HESSIAN = {(0.5, 2.0): (-0.68, -0.64, -0.84, -0.83), (1.0, 2.0): (-3.31, -3.13, -3.53, -3.37), (1.0, 3.0): (-3.57, -3.45, -3.48, -3.62),
           (1.5, 2.0): (-7.94, -8.13, -8.36, None)}  # fmt: skip
DRAWS = 5
WAYS = {"input": ("input", 0), "output": ("output", 0), "input + 3": ("input", 3), "output + 2": ("output", 2)}


def error(book, v: torch.Tensor) -> float:
    return float((book.decode(book.encode(v)) - v).square().mean())


def gaussian(samples: int) -> list[dict]:
    v = torch.randn(samples // 16, 16, generator=torch.Generator().manual_seed(5))
    rows = []
    for width in sorted({*BEST_KNOWN, 16, 24, 60} & set(widths(16))):
        found = error(preset(16, width), v)
        paper = error(gain_shape(16, width, 1 << 20), v) if width >= 24 else None
        gap = 10 * math.log10(found * 4 ** (width / 16))
        rows.append(
            {
                "part": f"gaussian, {width / 16:g} bits",
                "voroq": found,
                "spec": BEST_KNOWN.get(width),
                "paper": paper,
                "note": f"{gap:.2f} dB",
            }
        )
    return rows


def hessian(size: int, draws: int) -> list[dict]:
    found: dict[str, list[float]] = {}
    for draw in range(draws):
        rng = torch.Generator().manual_seed(draw)
        q = torch.linalg.qr(torch.randn(size, size, generator=rng))[0]
        w = torch.randn(size, size, generator=rng)
        for power, bits in HESSIAN:
            h = q @ torch.diag(torch.arange(1, size + 1).float() ** -power) @ q.T
            h /= h.diagonal().mean()
            book, tile = preset(16, round(16 * bits)), Tile(1, 16)
            nearest = proxy_loss(w - tile.join(book.decode(book.encode(tile.cut(w))), size), h).sum()
            for way, (along, sweeps) in WAYS.items():
                made = PVQ(bits=bits, along=along, sweeps=sweeps, rotation="none", damping=1e-5)(w, Moments(h, torch.zeros(size), 1), rng)
                decibels = float(10 * (proxy_loss(w - made.dequantize(), h).sum() / nearest).log10())
                found.setdefault(f"hessian, a = {power:g}, {bits:g} bits, {way}", []).append(decibels)
    spec = [known for ways in HESSIAN.values() for known in ways]
    return [
        {"part": part, "voroq": sum(all_of) / draws, "spec": known, "paper": None, "note": f"dB, {min(all_of):.2f} to {max(all_of):.2f}"}
        for (part, all_of), known in zip(found.items(), spec, strict=True)
    ]


def timed(samples: int) -> list[dict]:
    v, rows = torch.randn(samples // 16, 16, generator=torch.Generator().manual_seed(6)), []
    for width in (32, 48, 64):
        book = preset(16, width)
        spelled = book.spelled.encode(v)
        codes = book.number(spelled)
        works = {
            "encode": lambda b=book: b.spelled.encode(v),
            "encode in torch": lambda b=book: in_torch(b, v),
            "number": lambda b=book, s=spelled: b.number(s),
            "decode in torch": lambda b=book, c=codes: b.decode(c),
        }
        if native.library() is not None:
            out = v.numel() // 1024
            band = Band(0, 1024, Tile(16, 1), book, torch.ones(out // 16))
            packed = pack(Quantized((out, 1024), Chain(), (band,), (codes.reshape(out // 16, 1024, -1),)), torch.bfloat16, "voroq")
            works["decode to bfloat16"] = partial(cpu.weight, packed, torch.bfloat16)
        limits = {"encode": 150.0, "decode to bfloat16": 3.0}
        for name, work in works.items():
            row = {"part": f"time, {width / 16:g} bits, {name}", "voroq": best_of(3, work) / v.numel() * 1e9, "spec": limits.get(name)}
            rows.append({**row, "paper": None, "note": f"ns/weight, {len(book.pulses)} levels"})
    return rows


def in_torch(book: Pyramids, v: torch.Tensor) -> torch.Tensor:
    with patch.object(native, "library", lambda: None):
        return book.spelled.encode(v)


def products(size: int, repeats: int) -> list[dict]:
    dense, rows = torch.randn(size, size) / 64, []
    short, packed, rng = dense.bfloat16(), {}, torch.Generator().manual_seed(7)
    for width in (32, 48, 52, 64):
        book = preset(16, width)
        codes = book.encode(torch.randn(size * size // 16, 16, generator=rng)).reshape(size // 16, size, -1)
        q = Quantized((size, size), Chain(), (Band(0, size, Tile(16, 1), book, torch.ones(size // 16)),), (codes,))
        packed[f"{width / 16:g} bits, numbers"] = pack(q, torch.bfloat16, "voroq")
        packed[f"{width / 16:g} bits, expanded"] = expanded(packed[f"{width / 16:g} bits, numbers"])
    bits = {"dense float32": 32.0, "dense bfloat16": 16.0, **{name: bits_per_weight(p) for name, p in packed.items()}}
    for batch in (1, 4, 16, 64):
        x = torch.randn(batch, size)
        works = {"dense float32": partial(torch.matmul, x, dense.T), "dense bfloat16": partial(torch.matmul, x.bfloat16(), short.T)}
        found = in_turns(works | {name: partial(matmul, x, p) for name, p in packed.items()}, repeats)
        for name, seconds in found.items():
            part = {"part": f"product, batch {batch}, {name}", "voroq": seconds / size**2 * 1e9, "spec": None, "paper": None}
            rows.append({**part, "note": f"{found['dense bfloat16'] / seconds:.2f} x dense bfloat16, {bits[name]:.2f} bits"})
    return rows


def best_of(times: int, work: Callable[[], object]) -> float:
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", default="", choices=["", "gaussian", "hessian", "time", "product"], help="only this part")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "gaussian": lambda: gaussian(1 << (16 if args.quick else 21)),
        "hessian": lambda: hessian(64 if args.quick else 256, 1 if args.quick else DRAWS),
        "time": lambda: timed(1 << (16 if args.quick else 20)),
        "product": lambda: products(256 if args.quick else 2048, 1 if args.quick else 7),
    }
    rows = [row for name, part in parts.items() if args.part in ("", name) for row in part()]
    publish("pyramids", rows, args, presets={f"{dim}x{width}": distortion(dim, width) for dim in (8, 16) for width in widths(dim)})


if __name__ == "__main__":
    main()
