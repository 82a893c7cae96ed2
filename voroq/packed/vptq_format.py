"""The official VPTQ layout, `quant_method: "vptq"`, byte for byte (`docs/format.md` has a worked example).

Stored column p of the weight is one of `outlier_size` outlier columns, or column c of group t with
p = outlier_size + t * group_size + c. Vectors run down the output: code m of a column stands for rows m*v .. m*v + v-1.

    w[:, perm[p]] = stored[:, p]         then         w = w * weight_scale + weight_bias      (both in original column order)

This is the current layout: packed indices. `legacy.py` reads the older ones and turns them into this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.errors import FormatError
from voroq.numerics.bits import merge_streams, pack_bits, split_streams, unpack_bits, words_for
from voroq.packed import base
from voroq.packed.base import MAX_SIDE, MAX_TABLE, MAX_VECTOR, Fields, Role, Stored, as_int16, from_int16
from voroq.packed.codebooks import ResidualForm, TableForm, form_of
from voroq.quantized import Band, Quantized, Tile
from voroq.transform.affine import ColumnAffine
from voroq.transform.chain import Chain
from voroq.transform.permute import Permute
from voroq.transform.rows import RowAffine

LEAST_ROW = 17
"""Bits of codes in a group's row, at least: of shorter ones the official reader takes the padding for codes."""
MAX_PERMUTED = 1 << 16
"""Columns that a permutation of 16-bit numbers can name."""

_WRITTEN = (
    *("in_features", "out_features", "vector_lens", "num_centroids", "num_res_centroids", "group_num", "group_size", "outlier_size"),
    *("enable_norm", "enable_perm", "is_indice_packed", "indices_as_float", "bias"),
)
_TOLERATED = ("norm_dim", "vector_quant_dim", "enable_proxy_error")


@dataclass(frozen=True)
class Outliers:
    """The first `columns` stored columns, in a table of their own: `k` centroids of `vector` weights."""

    columns: int
    vector: int
    k: int


@dataclass(frozen=True)
class VptqSpec:
    """One linear of shape (out, in): `groups` bands of equal width, vectors of `vector` weights down the output.

    `k` centroids per table, `residual` centroids in the second stage (None: a single stage). `norm`: a scale and a shift for
    every column (`norm_dim` 0) or every row (1).
    """

    shape: tuple[int, int]
    vector: int
    k: int
    residual: int | None
    groups: int
    outliers: Outliers | None
    norm: bool
    perm: bool
    norm_dim: int = 0

    method: ClassVar[str] = "vptq"
    activations: ClassVar[None] = None

    @property
    def widths(self) -> tuple[int, ...]:
        main = self.k.bit_length() - 1
        return (main,) if self.residual is None else (main, self.residual.bit_length() - 1)

    @property
    def group_size(self) -> int:
        return (self.shape[1] - self._outlier_size) // self.groups

    @property
    def _outlier_size(self) -> int:
        return self.outliers.columns if self.outliers else 0

    def layout(self) -> tuple[Stored, ...]:
        out, columns = self.shape
        words = words_for(self.group_size, sum(self.widths))
        stored = [
            Stored("centroids.weight", (self.groups, self.k * self.vector), Role.TABLE),
            Stored("indices", (self.groups, -(-out // self.vector), words), Role.CODES, (torch.int32,)),
        ]
        if self.residual is not None:
            stored.append(Stored("res_centroids.weight", (self.groups, self.residual * self.vector), Role.TABLE))
        if self.outliers is not None:
            o = self.outliers
            stored.append(Stored("outlier_centroids.weight", (1, o.k * o.vector), Role.TABLE))
            stored.append(Stored("outlier_indices", (1, -(-out // o.vector), o.columns), Role.CODES, (torch.int16, torch.int32), limit=o.k))
        if self.perm:
            stored.append(Stored("perm", (columns,), Role.PERM, (torch.int16, torch.int32, torch.int64)))
        if self.norm:
            stored += [Stored(name, (self.shape[1 - self.norm_dim],), Role.SCALE) for name in ("weight_scale", "weight_bias")]
        return tuple(stored)

    def to_json(self, *, bias: bool = False) -> dict[str, Any]:
        o = self.outliers
        values = [
            *(self.shape[1], self.shape[0], [o.vector if o else -1, self.vector], [o.k if o else -1, self.k], [-1, self.residual or -1]),
            *(self.groups, self.group_size, self._outlier_size, self.norm, self.perm, True, False, bias),
        ]
        return dict(zip(_WRITTEN, values, strict=True)) | ({"norm_dim": self.norm_dim} if self.norm_dim else {})

    @staticmethod
    def from_json(data: Any, module: str, shape: tuple[int, int] | None = None) -> "VptqSpec":
        """The spec of `module`, or a FormatError naming the field at fault.

        `shape` (out, in), if known, fills in for files that leave it to the model, and must agree otherwise.
        """
        fields = Fields(data, module).only(*_WRITTEN, *_TOLERATED)
        out, columns = _shape(fields, shape)
        _refuse_variants(fields)
        vectors = fields.integers("vector_lens", 2, -1, MAX_VECTOR)
        tables = fields.integers("num_centroids", 2, -1, MAX_TABLE)
        residuals = fields.integers("num_res_centroids", 2, -1, MAX_TABLE)
        size = fields.integer("outlier_size", 0, columns)
        groups = fields.integer("group_num", 1, columns)
        if vectors[1] < 1:
            raise fields.fail("vector_lens", f"[-1 or 2 to {MAX_VECTOR}, 1 to {MAX_VECTOR}]")
        if residuals[0] > 0:
            raise fields.fail("num_res_centroids", "[-1, r]: outliers have no residual")
        if size + groups * fields.integer("group_size", 1, columns) != columns:
            raise fields.fail("group_size", f"such that outlier_size {size} + {groups} groups make {columns} columns")
        if (size > 0) != (vectors[0] > 0 and tables[0] > 0):
            raise fields.fail("outlier_size", "positive exactly when vector_lens and num_centroids describe outliers")
        outliers = None
        if size:
            if vectors[0] < 2:
                raise fields.fail("vector_lens", "at least 2 for the outliers")
            outliers = Outliers(size, vectors[0], _power_of_two(fields, "num_centroids", tables[0]))
        residual = _power_of_two(fields, "num_res_centroids", residuals[1]) if residuals[1] > 0 else None
        k = _power_of_two(fields, "num_centroids", tables[1])
        norm, perm = fields.boolean("enable_norm"), fields.boolean("enable_perm")
        if perm and columns > MAX_PERMUTED:
            raise fields.fail("enable_perm", f"false for more than {MAX_PERMUTED} columns")
        norm_dim = fields.integer("norm_dim", 0, 1) if norm and fields.data.get("norm_dim") is not None else 0
        spec = VptqSpec((out, columns), vectors[1], k, residual, groups, outliers, norm, perm, norm_dim)
        base.check_bounds(spec, module)
        return spec

    @staticmethod
    def of(q: Quantized) -> "VptqSpec":
        """The spec that stores `q`. Raises FormatError saying what of it this layout cannot hold."""
        norm, perm = _steps(q.transform)
        out, columns = q.shape
        if perm and columns > MAX_PERMUTED:
            raise FormatError(f"the vptq layout permutes at most {MAX_PERMUTED} columns, got {columns}; use the native layout")
        kinds = [_kind(band) for band in q.bands]
        first, rest = ([], kinds) if len(set(kinds)) == 1 else (kinds[:1], kinds[1:])
        if len(set(rest)) != 1:
            raise FormatError("the vptq layout needs groups of equal width and tables after at most one outlier band; use the native one")
        vector, sizes, width = rest[0]
        if width * sum(size.bit_length() - 1 for size in sizes) < LEAST_ROW:
            raise FormatError(
                f"the official vptq reader misreads groups of under {LEAST_ROW} bits a row, got {width} columns; use the native one"
            )
        outliers = None
        if first:
            outlier_vector, outlier_sizes, size = first[0]
            if len(outlier_sizes) > 1 or outlier_vector < 2:
                raise FormatError("the vptq layout needs outliers in vectors of at least 2, without residual; use the native layout")
            outliers = Outliers(size, outlier_vector, outlier_sizes[0])
        residual = sizes[1] if len(sizes) == 2 else None
        norm_dim = int(norm is RowAffine)
        return VptqSpec((out, columns), vector, sizes[0], residual, len(rest), outliers, norm is not None, perm, norm_dim)

    def pack(self, q: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
        bands, codes = list(q.bands), list(q.codes)
        tensors: dict[str, Tensor] = {}
        if self.outliers is not None:
            tensors["outlier_centroids.weight"] = bands.pop(0).codebook.centroids.reshape(1, -1).to(dtype)
            tensors["outlier_indices"] = as_int16(codes.pop(0)[None, :, :, 0].long())
        tables = [band.codebook.stages if self.residual else (band.codebook,) for band in bands]
        for stage, name in enumerate(["centroids.weight", "res_centroids.weight"][: len(self.widths)]):
            tensors[name] = torch.stack([table[stage].centroids.reshape(-1) for table in tables]).to(dtype)
        tensors["indices"] = torch.stack([pack_bits(merge_streams(c, self.widths), sum(self.widths)) for c in codes])
        for step in q.transform.steps:
            if isinstance(step, Permute):
                tensors["perm"] = as_int16(step.perm)
            else:
                tensors["weight_scale"], tensors["weight_bias"] = step.scale.to(dtype), step.shift.to(dtype)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quantized:
        bands: list[Band] = []
        codes: list[Int[Tensor, "rows cols s"]] = []
        if self.outliers is not None:
            o = self.outliers
            table = Table(tensors["outlier_centroids.weight"].float().reshape(o.k, o.vector))
            bands.append(Band(0, o.columns, Tile(o.vector, 1), table))
            codes.append(from_int16(tensors["outlier_indices"][0])[:, :, None])
        main = tensors["centroids.weight"].float().reshape(self.groups, self.k, self.vector)
        for t in range(self.groups):
            codebook: Table | Residual = Table(main[t])
            if self.residual is not None:
                codebook = Residual((codebook, Table(tensors["res_centroids.weight"][t].float().reshape(self.residual, self.vector))))
            start = self._outlier_size + t * self.group_size
            bands.append(Band(start, start + self.group_size, Tile(self.vector, 1), codebook))
            codes.append(split_streams(unpack_bits(tensors["indices"][t], sum(self.widths), self.group_size), self.widths))
        steps: list[ColumnAffine | RowAffine | Permute] = []
        if self.norm:
            affine = RowAffine if self.norm_dim else ColumnAffine
            steps.append(affine(tensors["weight_scale"].float(), tensors["weight_bias"].float()))
        if self.perm:
            steps.append(Permute(from_int16(tensors["perm"])))
        return Quantized(self.shape, Chain(tuple(steps)), tuple(bands), tuple(codes))


def _shape(fields: Fields, known: tuple[int, int] | None) -> tuple[int, int]:
    names = ("out_features", "in_features")
    if known is not None and not any(name in fields.data for name in names):
        return known
    out, columns = (fields.integer(name, 1, MAX_SIDE) for name in names)
    if known not in (None, (out, columns)):
        raise fields.fail(names[out == known[0]], f"{known[out == known[0]]}, as in the model")
    return out, columns


def _refuse_variants(fields: Fields) -> None:
    """Variants of the format that hold something else under the same names."""
    wanted = {"is_indice_packed": (True,), "indices_as_float": (False, None), "vector_quant_dim": ("out", None)}
    wanted |= {"enable_proxy_error": (False, None), "bias": (True, False, None)}
    for name, values in wanted.items():
        value = fields.data.get(name)
        if not any(value is v or (value == v and type(value) is type(v)) for v in values):
            raise fields.fail(name, f"{values[0]!r} (this variant of the vptq layout is not supported)")


def _power_of_two(fields: Fields, name: str, size: int) -> int:
    if size < 2 or size & (size - 1):
        raise fields.fail(name, f"a power of two from 2 to {MAX_TABLE}")
    return size


def _steps(transform: Chain) -> tuple[type[ColumnAffine | RowAffine] | None, bool]:
    """How `transform` scales and whether it permutes. Raises FormatError unless it is [ColumnAffine or RowAffine]?[Permute]?."""
    kinds = tuple(type(step) for step in transform.steps)
    norm = kinds[0] if kinds and kinds[0] in (ColumnAffine, RowAffine) else None
    if kinds[norm is not None :] not in ((), (Permute,)):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise FormatError(f"the vptq layout holds scales, then a Permute, both optional; got {names}; use the native layout")
    return norm, Permute in kinds


def _kind(band: Band) -> tuple[int, tuple[int, ...], int]:
    """(vector length, table sizes, columns) of a band that the layout can hold."""
    if band.tile.cols != 1 or band.scale is not None or band.zero is not None:
        raise FormatError("the vptq layout holds vectors down a column, without scale and zero per row; use the native layout")
    form = form_of(band.codebook)
    if isinstance(form, TableForm):
        sizes: tuple[int, ...] = (form.k,)
    elif isinstance(form, ResidualForm) and len(form.sizes) == 2:
        sizes = form.sizes
    else:
        raise FormatError(f"the vptq layout holds a table or a two-stage residual, not this {form.kind}; use the native layout")
    if len(sizes) == 2 and sizes[1] > sizes[0]:
        raise FormatError(f"the official vptq reader misreads a residual table larger than the main one, got {sizes[1]} and {sizes[0]}")
    return band.tile.rows, sizes, band.stop - band.start
