"""Searches the pulses and scales of `voroq/codebook/preset_table.py`: unions of pyramids for unit Gaussians, one per dimension and width.

    python benchmarks/pyramid_presets.py --dim 16 --bits 52 --bits 56 --proposals 200

For every width asked for: start from equal pulses on 4 to 12 levels and from the neighbouring widths in the file; then propose changes of
a level, the others filled up to the width, and keep those that lower the mean squared error on a fixed sample. Scales are Lloyd's. The
error in the file is of other samples, and a width is written only where it falls. Presets are for Gaussians: no text plays a part.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from voroq.codebook.pyramid import Pyramids
from voroq.numerics.pyramid import count

FILE = Path(__file__).parents[1] / "voroq" / "codebook" / "preset_table.py"
HEAD = '''# ruff: noqa: E501
"""(dimension, bits per vector): mean squared error for unit Gaussians, pulses and scales of the levels.

Written by `benchmarks/pyramid_presets.py`.
"""

TABLE = {
'''
Entry = tuple[float, tuple[int, ...], tuple[float, ...]]
console = Console()


def lloyd(book: Pyramids, v: torch.Tensor, steps: int) -> tuple[Pyramids, float]:
    """`book` after `steps` updates of its scales, and its error per weight before the last of them."""
    error = float("inf")
    for _ in range(steps):
        codes = book.spelled.encode(v)
        error = float((book.spelled.decode(codes) - v).square().mean())
        book = book.with_tensors({"scales": book.spelled.fitted(v, codes)})
    return book, error


def start(dim: int, bits: int, levels: int, v: torch.Tensor) -> Pyramids | None:
    """Equal pulses on `levels` levels, their radii at quantiles of the norm."""
    pulses = 0
    while levels * count(dim, pulses + 1) < 1 << bits:
        pulses += 1
    if not pulses:
        return None
    radii = v.abs().sum(1).quantile((torch.arange(levels) + 0.5) / levels)
    return Pyramids(dim, (pulses,) * levels, radii / pulses, bits)


def fits(dim: int, pulses: Sequence[int], bits: int) -> bool:
    return min(pulses) > 0 and sum(count(dim, k) for k in pulses) < 1 << bits


def propose(book: Pyramids, v: torch.Tensor, rng: torch.Generator) -> Pyramids:
    """`book` with one level changed, added or dropped, and the others cut or filled up to the width again."""

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=rng))

    dim, radii, pulses = book.dim, (book.scales * torch.tensor(book.pulses)).tolist(), list(book.pulses)
    kind, j = draw(8), draw(len(pulses))
    if kind == 0:
        radii.append(float(v[draw(v.shape[0])].abs().sum()))
        pulses.append(max(1, pulses[j] + draw(5) - 2))
    elif kind == 1 and len(pulses) > 2:
        del radii[j], pulses[j]
    else:
        pulses[j] = max(1, pulses[j] + draw(7) - 3)
        radii[j] *= 1 + (draw(5) - 2) / 20
    for _ in range(1000):
        if fits(dim, pulses, book.bits):
            break
        pulses[draw(len(pulses))] -= 1
        pulses = [max(1, k) for k in pulses]
    for _ in range(3 * len(pulses)):
        i = draw(len(pulses))
        if fits(dim, [k + (n == i) for n, k in enumerate(pulses)], book.bits):
            pulses[i] += 1
    if not fits(dim, pulses, book.bits):
        return book
    return Pyramids(dim, tuple(pulses), torch.tensor([r / k for r, k in zip(radii, pulses, strict=True)]), book.bits)


def search(dim: int, bits: int, seeds: list[Pyramids], proposals: int, rng: torch.Generator) -> Pyramids:
    v = torch.randn(2**17 // dim, dim, generator=rng)
    tried = [lloyd(book, v, 6) for book in [*[start(dim, bits, n, v) for n in (4, 5, 6, 7, 8, 9, 10, 12)], *seeds] if book is not None]
    best, least = min(tried, key=lambda pair: pair[1])
    for _ in range(proposals):
        book = propose(best, v, rng)
        if book.pulses != best.pulses:
            book, error = lloyd(book, v, 3)
            if error < least * (1 - 1e-5):
                best, least = book, error
    best, _ = lloyd(best, torch.randn(2**19 // dim, dim, generator=rng), 10)
    order = (best.scales * torch.tensor(best.pulses)).argsort()
    return Pyramids(dim, tuple(best.pulses[i] for i in order.tolist()), best.scales[order], bits)


def main(
    dim: Annotated[int, typer.Option(help="Weights per vector.")] = 16,
    bits: Annotated[list[int], typer.Option(help="Bits per vector; repeat for more.")] = [52, 56, 64],  # noqa: B006
    proposals: Annotated[int, typer.Option(help="Changes tried per width.")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    torch.set_num_threads(1)
    for width in bits:
        held = read()
        seeds = [
            Pyramids(dim, held[dim, near][1], torch.tensor(held[dim, near][2]), width)
            for near in (width, width - 1, width + 1)
            if (dim, near) in held and fits(dim, held[dim, near][1], width)
        ]
        rng = torch.Generator().manual_seed(1000 * seed + width)
        book = search(dim, width, seeds, proposals, rng)
        book = book.with_tensors({"scales": (book.scales * 1e5).round() / 1e5})
        fresh = torch.randn(2**21 // dim, dim, generator=torch.Generator().manual_seed(77))
        error = float((book.spelled.decode(book.spelled.encode(fresh)) - fresh).square().mean())
        before = held.get((dim, width), (float("inf"),))[0]
        console.print(f"{dim} x {width}: {book.pulses} error {error:.6f} (before {before:.6f})")
        if error < before:
            held[dim, width] = (round(error, 7), book.pulses, tuple(round(float(s), 5) for s in book.scales))
            write(held)


def read() -> dict[tuple[int, int], Entry]:
    return runpy.run_path(str(FILE))["TABLE"] if FILE.exists() else {}


def write(held: dict[tuple[int, int], Entry]) -> None:
    FILE.write_text(HEAD + "".join(f"    {key}: {held[key]},\n" for key in sorted(held)) + "}\n")


if __name__ == "__main__":
    typer.run(main)
