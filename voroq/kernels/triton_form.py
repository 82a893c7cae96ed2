"""What a kernel must know of a packed linear, as constants: its columns cut into pieces that one launch multiplies, and how to tile them.

A spec alone says it (nothing here looks at a tensor), so it is found once for every spec and kept. Kernels are compiled for a shape.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

from voroq.codebook.pyramid import SPLIT
from voroq.numerics.bits import words_for
from voroq.numerics.pyramid import count
from voroq.packed.base import Spec
from voroq.packed.codebooks import GainShapeForm, GridForm, PyramidForm, ResidualForm, TableForm
from voroq.packed.native_format import NativeSpec, Run, suffix
from voroq.packed.vptq_format import VptqSpec

LONGEST = 64
"""Weights per vector."""
THIN = 4
"""Rows of x up to which weights are multiplied where they are decoded, without tensor cores."""
CONFIGS = Path(__file__).with_name("triton_configs.json")


class Form(NamedTuple):
    """Bands alike: `groups` of `along` x `down` words of `size` weights, which lie down the output or along the input. `wide` is
    the power of two from `size` on, `entry` how far the words of a table are apart.

    The number of word (m, c) of group g has `step` bits, from bit (g * group_first + c) * step of row g * group_pitch + m * pitch on; with
    `step` 0 the numbers are whole integers and the pitches count those. Steps from group to group are in elements.
    """

    kind: str
    out: int
    columns: int
    down: int
    along: int
    groups: int
    start: int
    size: int
    entry: int
    wide: int
    is_down: bool
    step: int
    bits: int
    bits2: int
    pitch: int
    group_pitch: int
    group_first: int
    main_step: int
    second_first: int
    second_step: int
    zero_pitch: int
    scaled: bool
    zeroed: bool
    levels: int = 0
    most: int = 0
    log: int = 0
    long: int = 0
    halvings: int = 0

    def widened(self) -> "Form":
        """The same with tables whose rows are filled up to `wide`."""
        steps = {name: getattr(self, name) // self.size * self.wide for name in ("main_step", "second_first", "second_step")}
        return self._replace(entry=self.wide, **steps)

    @property
    def pulsed(self) -> bool:
        """Whether words are pyramids' points."""
        return self.most > 0


class Piece(NamedTuple):
    """A form, and the names of the tensors it is read from: codes, main table, second table, scales, zeros. `pulses` of pyramids."""

    form: Form
    names: tuple[str | None, ...]
    pulses: tuple[int, ...] = ()


class Tiling(NamedTuple):
    """A program has `rows` x `along` words and `batch` rows of x at a time; `splits` programs share a row of tiles."""

    rows: int
    along: int
    batch: int
    splits: int
    warps: int
    stages: int


@lru_cache(maxsize=1024)
def pieces(spec: Spec) -> tuple[Piece, ...] | None:
    """The pieces of `spec` in column order; None if the kernels lack something of it."""
    if isinstance(spec, VptqSpec):
        if max(spec.vector, spec.outliers.vector if spec.outliers else 1) > LONGEST or sum(spec.widths) > 32:
            return None
        return tuple(_vptq(spec))
    if isinstance(spec, NativeSpec) and all(_known(run) for run in spec.runs):
        return tuple(_native(spec))
    return None


def _known(run: Run) -> bool:
    form, size = run.form, run.tile.size
    if 1 not in (run.tile.rows, run.tile.cols) or size > LONGEST:
        return False
    if isinstance(form, PyramidForm):
        return size >= 2 and size & (size - 1) == 0 and getattr(form, "order", SPLIT) == SPLIT
    return isinstance(form, (GridForm, TableForm)) or (isinstance(form, ResidualForm) and len(form.sizes) == 2)


def _vptq(spec: VptqSpec) -> Iterator[Piece]:
    shapes, size = {stored.name: stored.shape for stored in spec.layout()}, 0
    if spec.outliers is not None:
        o = spec.outliers
        size, down = o.columns, -(-spec.shape[0] // o.vector)
        form = Form("table", *spec.shape, down, size, 1, 0, o.vector, o.vector, power(o.vector), True, 0, o.k.bit_length() - 1, 0,
                    size, 0, 0, 0, 0, 0, 0, False, False)  # fmt: skip
        yield Piece(form, ("outlier_indices", "outlier_centroids.weight", None, None, None))
    (down, pitch), (bits, bits2) = shapes["indices"][1:], (*spec.widths, 0)[:2]
    first = "table", *spec.shape, down, spec.group_size, spec.groups, size, spec.vector, spec.vector, power(spec.vector), True
    second_step = (spec.residual or 0) * spec.vector
    form = Form(*first, bits + bits2, bits, bits2, pitch, down * pitch, 0, spec.k * spec.vector, 0, second_step, 0, False, False)
    yield Piece(form, ("indices", "centroids.weight", "res_centroids.weight" if bits2 else None, None, None))


def _native(spec: NativeSpec) -> Iterator[Piece]:
    start = 0
    for place, run in enumerate(spec.runs):
        yield _run(run, spec.shape, start, suffix(place))
        start += run.count * run.columns


def _run(run: Run, shape: tuple[int, int], start: int, mark: str) -> Piece:
    shapes = {stored.name: stored.shape for stored in run.layout(shape[0], "")}
    (down, pitch), along, size = shapes["weight_codes"], run.columns // run.tile.cols, run.tile.size
    bits, bits2, second_first = run.width, 0, 0
    if isinstance(run.form, ResidualForm):
        (bits, bits2), second_first = run.form.widths, run.form.sizes[0] * size
    main_step = prod(shapes["weight_tables"][1:]) if run.form.rows else 0
    kind = "table" if isinstance(run.form, (TableForm, ResidualForm)) else run.form.kind
    form = Form(kind, *shape, down, along, run.count, start, size, size, power(size), run.tile.cols == 1, run.width, bits, bits2,
                pitch, 0, along, main_step, second_first, main_step, words_for(shape[0], run.width), run.scale, run.zero)  # fmt: skip
    table = f"weight_tables{mark}" if run.form.rows else None
    optional = [f"{name}{mark}" if has else None for name, has in (("weight_scales", run.scale), ("weight_zeros", run.zero))]
    names = (f"weight_codes{mark}", table, table if bits2 else None, *optional)
    if not isinstance(run.form, PyramidForm):
        return Piece(form, names)
    pulses = run.form.pulses if isinstance(run.form.pulses, tuple) else (run.form.pulses,)
    most = max(pulses)
    sizes = [size >> i for i in range(size.bit_length() - 2)]
    if isinstance(run.form, GainShapeForm):
        form = form._replace(bits=(count(size, most) - 1).bit_length())
    long = sum(count(n, most) >= 1 << 31 for n in sizes)
    form = form._replace(levels=run.form.rows, most=most, log=(most + 1).bit_length(), long=long, halvings=len(sizes))
    return Piece(form, names, pulses)


def tiling(form: Form, batch: int, device: str, units: int) -> Tiling:
    """How to cut the product of `form` with `batch` rows of x: what CONFIGS has for this device, else a rule. `units`: multiprocessors."""
    measured = _measured().get(device, {}).get(shape_key(form, batch))
    return Tiling(*measured) if measured else _rule(form, batch, units)


def shape_key(form: Form, batch: int) -> str:
    """A shape and a class of batches as CONFIGS names them."""
    side, columns = ("down", 1) if form.is_down else ("along", form.size)
    bits = f"{form.bits}+{form.bits2}" if form.bits2 else f"{form.bits}"
    shape = f"{form.out}x{form.groups * form.along * columns}"
    return f"{form.kind} {side}{form.size} bits{bits} {shape} batch{batch_class(batch)}"


def batch_class(batch: int) -> int:
    """Batches of one class share a kernel: 1, 2, 4 (thin), 16, 32, 64, 128 and more (wide)."""
    return power(batch) if batch <= THIN else min(128, max(16, power(batch)))


def _rule(form: Form, batch: int, units: int) -> Tiling:
    """Tiles that fit into registers, and four programs for every multiprocessor. Chosen by counting instructions, not measured."""
    rows, alone = batch_class(batch), form.kind == "grid"  # every weight of a grid is a word: twice the loads
    if batch <= THIN:
        along = min(32, power(form.along), max(1, 2048 // form.wide))
        sums = (1024 if alone else 2048 if form.pulsed else 4096) * (1 if rows == 1 else 2)
        down, warps = min(power(form.down), max(1, sums // (along * form.wide * rows))), 4
    else:
        deep, wide = (1, form.wide) if form.is_down else (form.wide, 1)
        along = max(16 // deep, 1, min((16 if form.pulsed else 32 if alone else 64) // deep, power(form.along)))
        down = max(16 // wide, 1, min((64 if alone else 128) // wide, power(form.down)))
        warps = 8 if rows >= 64 else 4
    programs = -(-form.down // down) * -(-batch // rows)
    tiles = form.groups * -(-form.along // along)
    stages = 1 if form.pulsed or batch <= THIN else 2 if alone else 3
    return Tiling(down, along, rows, min(tiles, max(1, 4 * units // programs)), warps, stages)


def power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=1)
def _measured() -> dict[str, dict[str, list[int]]]:
    """Device name -> shape -> Tiling, as `benchmarks/gpu.py --tune` found them."""
    return json.loads(CONFIGS.read_text(encoding="utf-8"))["devices"]
