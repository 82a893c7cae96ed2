"""y = x @ w.T on the CPU without building w: codes are unpacked, looked up and multiplied in one pass (csrc/cpu).

Reads the packed tensors as they are stored; nothing is prepared or kept. Up to `FUSED` rows of x it is one pass for every eight; with
more, panels of w that fit into the cache are decoded and multiplied by torch. Where the machine multiplies bfloat16 and x is that, the
library does both itself, strip by strip. Tables, grids of up to 8 bits, and pyramids of 8 or 16 dimensions, along one side of the
matrix; all sums in float32. The result does not depend on the number of threads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm, prod

import torch
from jaxtyping import Float
from torch import Tensor

from voroq import native
from voroq.codebook.pyramid import SPLIT
from voroq.native import REALS, Band, Product
from voroq.packed.base import Packed, Spec, from_int16
from voroq.packed.codebooks import Form, GainShapeForm, GridForm, PulsesForm, PyramidsForm, ResidualForm, TableForm
from voroq.packed.native_format import NativeSpec, Run, suffix
from voroq.packed.vptq_format import Outliers, VptqSpec

FUSED = 16
"""Rows of x that are multiplied without decoding panels."""
STRIP = 48
"""Rows of w that the library decodes to bfloat16 at a time, where the machine multiplies it: at least one tile of every band."""
PANEL = 1 << 20
"""Weights of a panel."""
LONGEST = 16
"""Weights per vector."""

Pointers = dict[str, int]
"""Address of every tensor, by its name."""


@dataclass(frozen=True)
class Plan:
    """What the library needs to know of one linear, addresses of its tensors included."""

    bands: object  # a ctypes array of Band
    count: int
    unit: int
    columns: tuple[int | None, int, int | None, int | None]
    """perm, bytes of one of its entries, scale, shift"""
    rows: tuple[int | None, int | None]
    real: int
    pyramids: tuple[native.Pyramid, ...]
    """What the bands point to, kept while the plan is."""


def supports(spec: Spec, x: Float[Tensor, "*batch in"]) -> bool:
    return native.library() is not None and x.device.type == "cpu" and x.dtype in REALS and known(spec)


def matmul(x: Float[Tensor, "*batch in"], packed: Packed) -> Float[Tensor, "*batch out"]:
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.is_contiguous() else flat.contiguous()
    spec, inside = packed.spec, without_transform(packed)
    if inside is not packed:
        y = spec.transform(packed.tensors).linear(flat.float(), lambda inner: _multiply(inner.contiguous(), inside)).to(x.dtype)
    else:
        y = _multiply(flat, packed)
    return y.reshape(*x.shape[:-1], spec.shape[0])


def without_transform(packed: Packed) -> Packed:
    """What is multiplied inside of the transform of `packed`; itself where that is no more than a permutation, which the library knows."""
    if not isinstance(packed.spec, NativeSpec) or not set(packed.spec.steps) - {"permute"}:
        return packed
    codes = replace(packed.spec, steps=())
    return Packed(codes, {stored.name: packed.tensors[stored.name] for stored in codes.layout()})


def weight(packed: Packed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The stored weight, in the basis of its codes where that is rotated; bit for bit what `dequantize` gives where it is not."""
    w = torch.empty(packed.spec.shape, dtype=dtype)
    Call(packed).decode(0, w)
    return w


def _multiply(x: Float[Tensor, "n in"], packed: Packed) -> Float[Tensor, "n out"]:
    out, columns = packed.spec.shape
    y, call = torch.empty(x.shape[0], out, dtype=x.dtype), Call(packed)
    if x.shape[0] <= FUSED or call.strips(x.dtype):
        call.multiply(x, y)
        return y
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # no machine of this kind multiplies float16 fast
    inner, add = _stored_inputs(x, packed)
    rows = max(1, PANEL // columns // call.plan.unit) * call.plan.unit
    panel, inner = torch.empty(min(rows, out), columns, dtype=wide), inner.to(wide)
    for first in range(0, out, rows):
        part = panel[: min(rows, out - first)]
        call.decode(first, part, stored=True)
        y[:, first : first + part.shape[0]] = inner @ part.T
    return add(y)


def _stored_inputs(x: Float[Tensor, "n in"], packed: Packed) -> tuple[Float[Tensor, "n in"], Callable[[Tensor], Tensor]]:
    """x as columns in stored order want it, so that no weight has to be moved or scaled; and what is done to the product with them."""
    tensors, vptq = packed.tensors, isinstance(packed.spec, VptqSpec)
    perm = tensors.get("perm" if vptq else "weight_perm")
    scale, shift = (tensors.get(name) for name in ("weight_scale", "weight_bias")) if vptq else (None, None)
    inner, by_row = x.float(), scale is not None and packed.spec.norm_dim == 1
    if scale is not None and not by_row:
        inner = inner * scale.float()
    if perm is not None:
        inner = inner[:, from_int16(perm)]
    if scale is None:
        return inner, lambda y: y
    if by_row:
        return inner, lambda y: (y.float() * scale.float() + x.float().sum(1, keepdim=True) * shift.float()).to(x.dtype)
    return inner, lambda y: (y.float() + (x.float() @ shift.float())[:, None]).to(x.dtype)


class Call:
    """The tensors of `packed` held contiguous, and what the library is told about them."""

    def __init__(self, packed: Packed) -> None:
        self.held = {name: tensor if tensor.is_contiguous() else tensor.detach().contiguous() for name, tensor in packed.tensors.items()}
        odd = self.held.get("outlier_indices")
        if odd is not None and odd.dtype == torch.int16 and odd.shape[-1] % 2:  # rows must be whole words
            self.held["outlier_indices"] = torch.nn.functional.pad(odd, (0, 1))
        facts = tuple((name, tensor.data_ptr(), tensor.dtype) for name, tensor in self.held.items())
        self.shape, self.plan = packed.spec.shape, _plan(packed.spec, facts)

    def strips(self, dtype: torch.dtype) -> bool:
        """Whether the library itself goes on with more rows of x."""
        return dtype == torch.bfloat16 and native.isas()[max(ISA, 0)] == "avx512bf16" and self.plan.unit <= STRIP

    def multiply(self, x: Float[Tensor, "n in"], y: Float[Tensor, "n out"]) -> None:
        native.call("voroq_product", self.product(x, y))

    def decode(self, first: int, into: Float[Tensor, "rows in"], *, stored: bool = False) -> None:
        """Rows from `first` on; `stored`: columns as they are stored, neither moved nor scaled."""
        product = self.product()
        if stored:
            product.perm = product.scale = product.shift = product.row_scale = product.row_shift = None
        native.call("voroq_decode", product, first, first + into.shape[0], into.data_ptr(), REALS[into.dtype])

    def product(self, x: Tensor | None = None, y: Tensor | None = None) -> Product:
        """What the library is asked for; without inputs, all but them."""
        plan, (out, columns) = self.plan, self.shape
        perm, width, scale, shift = plan.columns
        given = (x.shape[0], x.data_ptr(), y.data_ptr(), REALS[x.dtype]) if x is not None else (0, None, None, 0)
        return Product(
            *(out, columns, given[0], plan.count),
            *(plan.bands, given[1], given[2], perm, scale, shift, *plan.rows),
            *(given[3], plan.real, width, torch.get_num_threads(), ISA),
        )


ISA = -1
"""The instruction set to use, as a place in `native.isas()`; -1 is the best. Tests set it."""


@lru_cache(maxsize=4096)
def _plan(spec: Spec, facts: tuple[tuple[str, int, torch.dtype], ...]) -> Plan:
    """From the addresses and types of all tensors: whatever else once lay there, a plan from the same facts is the same."""
    at = {name: address for name, address, _ in facts}
    dtypes = {name: dtype for name, _, dtype in facts}
    reals = {dtypes[stored.name] for stored in spec.layout() if stored.real}
    if len(reals) > 1:
        raise ValueError(f"all tables and scales of a linear must have one type, got {', '.join(sorted(map(str, reals)))}")
    real = next(iter(reals), torch.float32)
    bands = list((_vptq_bands if isinstance(spec, VptqSpec) else _native_bands)(spec, at, dtypes, real))
    perm = "perm" if isinstance(spec, VptqSpec) else "weight_perm"
    perm_bytes = dtypes[perm].itemsize if perm in at else 0
    scales = at.get("weight_scale"), at.get("weight_bias")
    by_row = isinstance(spec, VptqSpec) and spec.norm_dim == 1
    return Plan(
        (Band * len(bands))(*bands),
        len(bands),
        lcm(*(_rows(band.rows) for band in bands)),
        (at.get(perm), perm_bytes, *((None, None) if by_row else scales)),
        scales if by_row else (None, None),
        REALS[real],
        tuple(found for run in getattr(spec, "runs", ()) if (found := _pyramid(run.form))),
    )


def _vptq_bands(spec: VptqSpec, at: Pointers, dtypes: dict[str, torch.dtype], real: torch.dtype) -> Iterator[Band]:
    size = 0
    if spec.outliers is not None:
        o, wide = spec.outliers, dtypes["outlier_indices"].itemsize * 8
        size, bits = o.columns, o.k.bit_length() - 1
        pitch = -(-o.columns * wide // 32)
        yield Band(
            *(at["outlier_indices"], pitch, 0, o.columns, 0, at["outlier_centroids.weight"], None, None, None, None),
            *(o.vector, 1, wide, bits, 0, native.TABLE, REALS[real]),
        )
    shapes = {stored.name: stored.shape for stored in spec.layout()}
    down, words = shapes["indices"][1:]
    bits, residual_bits = (*spec.widths, 0)[:2]
    for t in range(spec.groups):
        main, second = (at[n] + t * shapes[n][1] * real.itemsize if n in at else None for n in ("centroids.weight", "res_centroids.weight"))
        yield Band(
            *(at["indices"] + t * down * words * 4, words, 0, spec.group_size, size + t * spec.group_size),
            *(main, second, None, None, None),
            *(spec.vector, 1, sum(spec.widths), bits, residual_bits, native.TABLE, REALS[real]),
        )


def _native_bands(spec: NativeSpec, at: Pointers, dtypes: dict[str, torch.dtype], real: torch.dtype) -> Iterator[Band]:
    out, start = spec.shape[0], 0
    for place, run in enumerate(spec.runs):
        mark = suffix(place)
        yield from _run_bands(run, out, start, {stored.name: at[stored.name + mark] for stored in run.layout(out, "")}, real)
        start += run.count * run.columns


def _run_bands(run: Run, out: int, start: int, at: Pointers, real: torch.dtype) -> Iterator[Band]:
    shapes = {stored.name: stored.shape for stored in run.layout(out, "")}
    pitch = shapes["weight_codes"][1]
    along = run.columns // run.tile.cols
    widths, shared = (*run.form.widths, 0)[:2], _pyramid(run.form)
    wide = {"weight_zeros": 4, "weight_pulses": 1}
    sizes = {name: prod(shape[1:]) * wide.get(name, real.itemsize) for name, shape in shapes.items()}
    for i in range(run.count):
        own = {name: at[name] + i * sizes[name] for name in shapes if name != "weight_codes"}
        table = own.get("weight_tables")
        second = own.get("weight_pulses")
        if isinstance(run.form, ResidualForm):
            second = table + (1 << widths[0]) * run.tile.size * real.itemsize
        bits, more = (run.form.rows, run.form.entry) if isinstance(run.form, PulsesForm) else (widths[0], widths[1] if second else 0)
        yield Band(
            *(at["weight_codes"], pitch, i * along, along, start + i * run.columns),
            *(table, second, own.get("weight_scales"), own.get("weight_zeros"), shared.handle if shared else None),
            *(run.tile.rows, run.tile.cols, run.width, bits, more),
            *(KINDS.get(type(run.form), native.TABLE), REALS[real]),
        )


KINDS = {GridForm: native.GRID, PyramidsForm: native.PYRAMID, GainShapeForm: native.PYRAMID, PulsesForm: native.PULSES}
"""What is not a table."""


def _pyramid(form: Form) -> native.Pyramid | None:
    """The library's pyramids of a form; None where it has none, or the form is another."""
    if isinstance(form, PyramidsForm):
        return native.pyramid(form.dim, form.pulses, form.bits, classes=form.order != SPLIT)
    if isinstance(form, GainShapeForm):
        return native.pyramid(form.dim, (form.pulses,), sum(form.widths[:-1]), form.gains)
    return None


@lru_cache(maxsize=1024)
def known(spec: Spec) -> bool:
    """Whether the library has what `spec` asks for."""
    if isinstance(spec, VptqSpec):
        return spec.vector <= LONGEST and sum(spec.widths) <= 32 and (spec.outliers is None or _known_outliers(spec.outliers))
    return isinstance(spec, NativeSpec) and all(_known_run(run) for run in spec.runs)


def _known_outliers(outliers: Outliers) -> bool:
    rows = _rows(outliers.vector)
    return rows <= LONGEST and outliers.k * (outliers.vector // rows) <= 1 << 16


def _rows(vector: int) -> int:
    """Rows of the words that the library cuts those of outliers into where they are long: a power of two of them, if that can be."""
    parts = 1 << (-(-vector // LONGEST) - 1).bit_length()
    return vector // parts if vector % parts == 0 else vector


def _known_run(run: Run) -> bool:
    if isinstance(run.form, GridForm):
        return run.tile.size == 1
    if isinstance(run.form, PyramidsForm | GainShapeForm):
        return 1 in (run.tile.rows, run.tile.cols) and _pyramid(run.form) is not None
    if isinstance(run.form, PulsesForm):
        return 1 in (run.tile.rows, run.tile.cols) and run.form.dim in native.PYRAMID_DIMS
    tables = isinstance(run.form, TableForm) or (isinstance(run.form, ResidualForm) and len(run.form.sizes) == 2)
    return tables and 1 in (run.tile.rows, run.tile.cols) and run.tile.size <= LONGEST and run.width <= 32
