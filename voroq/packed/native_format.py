"""The native layout, `quant_method: "voroq"`: any bands, tiles and codebooks, every code at its exact width.

    {"shape": [out, in], "transform": [{"kind": "permute"}], "bands": [run, ...]}
    run = {"count": 32, "columns": 128, "tile": [1, 1], "codebook": {"kind": "grid", "bits": 3}, "scale": true, "zero": true}

Consecutive bands equal but for their position form one run, so that GPTQ's hundred groups are one line of JSON and a handful
of tensors. A narrower last group is a run of its own. `docs/format.md` is the normative description.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.activations import KINDS, Activations
from voroq.errors import FormatError
from voroq.numerics.bits import code_dtype, merge_streams, pack_bits, split_streams, unpack_bits, words_for
from voroq.packed import base
from voroq.packed.base import MAX_SIDE, MAX_VECTOR, Fields, Role, Stored, as_int16, from_int16
from voroq.packed.codebooks import Form, GridForm, PulsesForm, form_from_json, form_of
from voroq.quantized import Band, Quantized, Tile
from voroq.transform.affine import ColumnAffine
from voroq.transform.base import Transform
from voroq.transform.chain import Chain
from voroq.transform.hadamard import Hadamard
from voroq.transform.permute import Permute

TRANSFORMS = {"affine": ColumnAffine, "permute": Permute, "rotate_in": Hadamard, "rotate_both": Hadamard}
"""Transforms a file can hold, by the name in its config; each at most once."""

_STEP_TENSORS = {
    "affine": {"scale": "weight_scale_in", "shift": "weight_shift_in"},
    "permute": {"perm": "weight_perm"},
    "rotate_in": {"input": "weight_signs_in"},
    "rotate_both": {"input": "weight_signs_in", "output": "weight_signs_out"},
}


@dataclass(frozen=True)
class Run:
    """`count` consecutive bands of `columns` columns each, alike in tile, codebook and in having scales and zeros."""

    count: int
    columns: int
    tile: Tile
    form: Form
    scale: bool
    zero: bool

    @property
    def width(self) -> int:
        """Bits of a merged code."""
        return sum(self.form.widths)

    def layout(self, out: int, suffix: str) -> list[Stored]:
        down, along = self.tile.grid(out, self.count * self.columns)
        stored = [Stored(f"weight_codes{suffix}", (down, words_for(along, self.width)), Role.CODES, (torch.int32,))]
        if isinstance(self.form, PulsesForm):
            entries = (self.count, down, self.columns // self.tile.cols * self.form.dim * self.form.entry // 8)
            stored.append(Stored(f"weight_pulses{suffix}", entries, Role.CODES, (torch.int8,)))
        if self.form.rows:
            table = (self.count, self.form.rows, self.form.columns(self.tile.size))
            stored.append(Stored(f"weight_tables{suffix}", table, Role.TABLE))
        if self.scale:
            stored.append(Stored(f"weight_scales{suffix}", (self.count, down), Role.SCALE))
        if self.zero:
            stored.append(Stored(f"weight_zeros{suffix}", (self.count, words_for(out, self.width)), Role.CODES, (torch.int32,)))
        return stored

    def to_json(self) -> dict[str, Any]:
        place = {"count": self.count, "columns": self.columns, "tile": [self.tile.rows, self.tile.cols]}
        return {**place, "codebook": self.form.to_json(), "scale": self.scale, "zero": self.zero}

    @staticmethod
    def from_json(fields: Fields) -> "Run":
        fields.only("count", "columns", "tile", "codebook", "scale", "zero")
        tile = Tile(*fields.integers("tile", 2, 1, MAX_VECTOR))
        form = form_from_json(fields.nested("codebook"))
        columns = fields.integer("columns", 1, MAX_SIDE)
        run = Run(fields.integer("count", 1, MAX_SIDE), columns, tile, form, fields.boolean("scale"), fields.boolean("zero"))
        if tile.size > MAX_VECTOR or columns % tile.cols:
            raise fields.fail("tile", f"of at most {MAX_VECTOR} weights, and as wide as divides {columns} columns")
        try:
            form.columns(tile.size)
        except ValueError as error:
            raise fields.fail("tile", str(error)) from None
        if run.zero and not isinstance(form, GridForm):
            raise fields.fail("zero", "false unless the codebook is a grid")
        return run


@dataclass(frozen=True)
class NativeSpec:
    """One linear of shape (out, in): the kinds of its transform's steps in order, and its runs of bands in column order."""

    shape: tuple[int, int]
    steps: tuple[str, ...]
    runs: tuple[Run, ...]
    activations: Activations | None = None
    """What becomes of the inputs, after the transform; None leaves them as they are."""

    method: ClassVar[str] = "voroq"

    def layout(self) -> tuple[Stored, ...]:
        out, columns = self.shape
        stored = [tensor for i, run in enumerate(self.runs) for tensor in run.layout(out, suffix(i))]
        if "permute" in self.steps:
            dtype = torch.int16 if columns <= 1 << 16 else torch.int32
            stored.append(Stored("weight_perm", (columns,), Role.PERM, (dtype,)))
        if "affine" in self.steps:
            stored += [Stored(name, (columns,), Role.SCALE) for name in _STEP_TENSORS["affine"].values()]
        for kind in ("rotate_in", "rotate_both"):
            if kind in self.steps:
                sides = zip(_STEP_TENSORS[kind].values(), (columns, out), strict=False)
                stored += [Stored(name, (words_for(side, 1),), Role.CODES, (torch.int32,)) for name, side in sides]
        return tuple(stored)

    def to_json(self, *, bias: bool = False) -> dict[str, Any]:
        transform = [{"kind": kind} for kind in self.steps]
        entry = {"shape": list(self.shape), "transform": transform, "bands": [run.to_json() for run in self.runs]}
        return entry if self.activations is None else {**entry, "activations": self.activations.to_json()}

    @staticmethod
    def from_json(data: Any, module: str, shape: tuple[int, int] | None = None) -> "NativeSpec":
        """The spec of `module`, or a FormatError naming the field at fault. `shape` (out, in), if known, must agree."""
        fields = Fields(data, module).only("shape", "transform", "bands", "activations")
        out, columns = fields.integers("shape", 2, 1, MAX_SIDE)
        if shape not in (None, (out, columns)):
            raise fields.fail("shape", f"{list(shape)}, as in the model")
        steps = tuple(step.only("kind").choice("kind", TRANSFORMS) for step in fields.objects("transform", len(TRANSFORMS)))
        if len({TRANSFORMS[step] for step in steps}) != len(steps):
            raise fields.fail("transform", "a list in which each kind occurs at most once, and one rotation at most")
        runs = tuple(Run.from_json(run) for run in fields.objects("bands", columns))
        covered = sum(run.count * run.columns for run in runs)
        if covered != columns:
            raise FormatError(f"quantization config of {module}: bands must cover {columns} columns, got {covered}")
        activations = None
        if "activations" in fields.data:
            inputs = fields.nested("activations").only("bits", "kind")
            activations = Activations(inputs.integer("bits", 4, 8), inputs.choice("kind", KINDS))
        spec = NativeSpec((out, columns), steps, runs, activations)
        base.check_bounds(spec, module)
        return spec

    @staticmethod
    def of(q: Quantized) -> "NativeSpec":
        """The spec that stores `q`. Raises FormatError saying what of it this layout cannot hold."""
        steps = tuple(_kind(step) for step in q.transform.steps)
        if len({TRANSFORMS[step] for step in steps}) != len(steps):
            raise FormatError(f"a transform with the steps {', '.join(steps)} cannot be stored: each kind, and one rotation, at most once")
        for band in q.bands:
            if band.zero is not None:
                _check_zeros(band)
        runs = [(run, len(list(bands))) for run, bands in groupby(_as_run(band) for band in q.bands)]
        return NativeSpec(tuple(q.shape), steps, tuple(Run(count, r.columns, r.tile, r.form, r.scale, r.zero) for r, count in runs))

    def pack(self, q: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for i, (run, at) in enumerate(self._runs_with_start()):
            bands, codes, mark = q.bands[at : at + run.count], q.codes[at : at + run.count], suffix(i)
            if isinstance(run.form, PulsesForm):
                tensors[f"weight_pulses{mark}"] = torch.stack([run.form.store(c) for c in codes])
            merged = [merge_streams(c, run.form.widths).to(code_dtype(run.width)) for c in codes]
            tensors[f"weight_codes{mark}"] = pack_bits(torch.cat(merged, dim=1), run.width)
            if run.form.rows:
                tensors[f"weight_tables{mark}"] = torch.stack([run.form.table(band.codebook) for band in bands]).to(dtype)
            if run.scale:
                tensors[f"weight_scales{mark}"] = torch.stack([band.scale for band in bands]).to(dtype)
            if run.zero:
                tensors[f"weight_zeros{mark}"] = pack_bits(torch.stack([band.zero for band in bands]).long(), run.width)
        for kind, step in zip(self.steps, q.transform.steps, strict=True):
            for field, name in _STEP_TENSORS[kind].items():
                value = step.tensors()[field]
                tensors[name] = _packed_step(kind, value, dtype)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quantized:
        bands, codes, start = [], [], 0
        for i, run in enumerate(self.runs):
            for band, band_codes in _unpack_run(run, tensors, suffix(i), start, self.shape[0]):
                bands.append(band)
                codes.append(band_codes)
            start += run.count * run.columns
        return Quantized(self.shape, self.transform(tensors), tuple(bands), tuple(codes))

    def transform(self, tensors: Mapping[str, Tensor]) -> Chain:
        """The basis that the codes are written in."""
        return Chain(tuple(self._step(kind, {field: tensors[name] for field, name in _STEP_TENSORS[kind].items()}) for kind in self.steps))

    def _step(self, kind: str, stored: dict[str, Tensor]) -> Transform:
        if kind in _SIGNED:
            sides = {"input": self.shape[1], "output": self.shape[0]}
            return Hadamard(**{side: _signs(words, sides[side]) for side, words in stored.items()})
        return TRANSFORMS[kind](**{field: from_int16(t) if kind == "permute" else t.float() for field, t in stored.items()})

    def _runs_with_start(self) -> list[tuple[Run, int]]:
        starts = accumulate((run.count for run in self.runs), initial=0)
        return list(zip(self.runs, starts, strict=False))


_SIGNED = ("rotate_in", "rotate_both")


def _kind(step: Transform) -> str:
    if isinstance(step, Hadamard):
        return "rotate_in" if step.output is None else "rotate_both"
    found = next((name for name, kind in TRANSFORMS.items() if type(step) is kind), None)
    if found is None:
        raise FormatError(f"a {type(step).__name__} transform cannot be stored; storable are {', '.join(TRANSFORMS)}")
    return found


def _packed_step(kind: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A step's tensor as it is stored; signs take one bit each, 1 for -1."""
    if kind == "permute":
        return _narrow_perm(value)
    if kind in _SIGNED:
        return pack_bits((value < 0).long()[None], 1)[0]
    return value.to(dtype)


def _signs(words: Int[Tensor, "w"], count: int) -> Int[Tensor, "n"]:
    return (1 - 2 * unpack_bits(words[None], 1, count)[0]).to(torch.int8)


def suffix(run: int) -> str:
    return f"_{run}" if run else ""


def _as_run(band: Band) -> Run:
    return Run(1, band.stop - band.start, band.tile, form_of(band.codebook), band.scale is not None, band.zero is not None)


def _check_zeros(band: Band) -> None:
    form = form_of(band.codebook)
    if not isinstance(form, GridForm):
        raise FormatError(f"zero points of a {form.kind} cannot be stored, only those of a grid")
    zero, top = band.zero, 2**form.bits - 1
    if not bool(((zero == zero.round()) & (zero >= 0) & (zero <= top)).all()):
        raise FormatError(f"zero points must be integers from 0 to {top} to be stored, got values from {zero.min():g} to {zero.max():g}")


def _unpack_run(run: Run, tensors: Mapping[str, Tensor], suffix: str, start: int, out: int) -> list[tuple[Band, Tensor]]:
    along = run.columns // run.tile.cols
    merged = unpack_bits(tensors[f"weight_codes{suffix}"], run.width, run.count * along)
    codes = split_streams(merged, run.form.widths).split(along, dim=1)
    if isinstance(run.form, PulsesForm):
        codes = [run.form.restore(*both) for both in zip(codes, tensors[f"weight_pulses{suffix}"], strict=True)]
    none = [None] * run.count
    tables: list[Float[Tensor, "k _"]] = [torch.empty(0, 1)] * run.count
    if run.form.rows:
        tables = list(tensors[f"weight_tables{suffix}"].float())
    scales = list(tensors[f"weight_scales{suffix}"].float()) if run.scale else none
    zeros = list(unpack_bits(tensors[f"weight_zeros{suffix}"], run.width, out).float()) if run.zero else none
    starts = [start + i * run.columns for i in range(run.count)]
    bands = [
        Band(at, at + run.columns, run.tile, run.form.codebook(table), scale, zero)
        for at, table, scale, zero in zip(starts, tables, scales, zeros, strict=True)
    ]
    return list(zip(bands, codes, strict=True))


def _narrow_perm(perm: Int[Tensor, "in"]) -> Int[Tensor, "in"]:
    return as_int16(perm) if perm.shape[0] <= 1 << 16 else perm.to(torch.int32)
