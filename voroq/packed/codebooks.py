"""The shape of a codebook as JSON, and its numbers as one table.

    {"kind": "grid", "bits": 3}    {"kind": "table", "k": 256}    {"kind": "residual", "k": [65536, 256]}
    {"kind": "pyramids", "dim": 16, "bits": 32, "pulses": [8, 8, 10, 9, 8, 12, 9], "order": "split-v1"}
    {"kind": "gain_shape", "dim": 16, "pulses": 11, "gains": 2, "order": "split-v1"}
    {"kind": "pulses", "dim": 16, "pulses": [8, 8, 10, 9, 8, 12, 9], "entry": 8}

A residual's stages lie below each other in one table, main first. The table of pyramids has one column: a scale for every level, or the
gains.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.codebook.base import Codebook
from voroq.codebook.gain_shape import GainShape
from voroq.codebook.grid import Grid
from voroq.codebook.pyramid import ORDERS, SPLIT, Pulses, Pyramids
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.errors import FormatError
from voroq.packed.base import MAX_TABLE, MAX_VECTOR, Fields

MAX_PULSES = 255
"""Pulses of a level; what decoding looks up grows with their square."""
MAX_LEVELS = 64
MAX_ENTRY = 127
"""Pulses of a level whose entries are stored: one of them fits into a byte."""


@runtime_checkable
class Form(Protocol):
    kind: ClassVar[str]
    widths: tuple[int, ...]
    """Bits of each stream."""
    rows: int
    """Rows of the stored table; 0 when the words are known without one."""

    def columns(self, size: int) -> int:
        """Columns of the stored table for tiles of `size` weights. Raises ValueError, saying what is needed, for tiles that do not fit."""

    def to_json(self) -> dict[str, Any]: ...

    def table(self, codebook: Any) -> Tensor: ...

    def codebook(self, table: Tensor) -> Codebook: ...


@dataclass(frozen=True)
class GridForm:
    bits: int

    kind: ClassVar[str] = "grid"
    rows: ClassVar[int] = 0

    def columns(self, size: int) -> int:
        if size != 1:
            raise ValueError("[1, 1] for a grid")
        return 1

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.bits,)

    @staticmethod
    def of(codebook: Grid) -> "GridForm":
        return GridForm(codebook.bits)

    @staticmethod
    def from_json(fields: Fields) -> "GridForm":
        return GridForm(fields.only("kind", "bits").integer("bits", 1, 8))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "bits": self.bits}

    def table(self, codebook: Grid) -> Float[Tensor, "0 1"]:
        return torch.empty(0, 1)

    def codebook(self, table: Float[Tensor, "k dim"]) -> Grid:
        return Grid(self.bits)


@dataclass(frozen=True)
class TableForm:
    k: int

    kind: ClassVar[str] = "table"

    @property
    def rows(self) -> int:
        return self.k

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.k.bit_length() - 1,)

    def columns(self, size: int) -> int:
        return size

    @staticmethod
    def of(codebook: Table) -> "TableForm":
        return TableForm(codebook.centroids.shape[0])

    @staticmethod
    def from_json(fields: Fields) -> "TableForm":
        k = fields.only("kind", "k").integer("k", 2, MAX_TABLE)
        if k & (k - 1):
            raise fields.fail("k", "a power of two")
        return TableForm(k)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "k": self.k}

    def table(self, codebook: Table) -> Float[Tensor, "k dim"]:
        return codebook.centroids

    def codebook(self, table: Float[Tensor, "k dim"]) -> Table:
        return Table(table)


@dataclass(frozen=True)
class ResidualForm:
    sizes: tuple[int, ...]

    kind: ClassVar[str] = "residual"

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(k.bit_length() - 1 for k in self.sizes)

    def columns(self, size: int) -> int:
        return size

    @staticmethod
    def of(codebook: Residual) -> "ResidualForm":
        return ResidualForm(tuple(stage.centroids.shape[0] for stage in codebook.stages))

    @staticmethod
    def from_json(fields: Fields) -> "ResidualForm":
        return ResidualForm(fields.only("kind", "k").table_sizes("k"))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "k": list(self.sizes)}

    def table(self, codebook: Residual) -> Float[Tensor, "k dim"]:
        return torch.cat([stage.centroids for stage in codebook.stages])

    def codebook(self, table: Float[Tensor, "k dim"]) -> Residual:
        return Residual(tuple(Table(stage) for stage in table.split(list(self.sizes))))


@dataclass(frozen=True)
class PyramidForm:
    """What the two forms on pyramids share: no words but a table of one column, and numbers that must exist."""

    dim: int

    rows: ClassVar[int]

    @property
    def widths(self) -> tuple[int, ...]:
        return self.codebook(torch.ones(self.rows, 1)).widths

    def columns(self, size: int) -> int:
        if size != self.dim:
            raise ValueError(f"of {self.dim} weights, the dimension of the pyramids")
        return 1

    def checked(self, fields: Fields) -> "PyramidForm":
        """This form, if its points can be numbered."""
        try:
            self.codebook(torch.ones(self.rows, 1))
        except ValueError as error:
            raise fields.fail("pulses", f"such that every point has a number ({error})") from None
        return self


@dataclass(frozen=True)
class PyramidsForm(PyramidForm):
    bits: int
    pulses: tuple[int, ...]
    order: str = SPLIT

    kind: ClassVar[str] = "pyramids"

    @property
    def rows(self) -> int:
        return len(self.pulses)

    @staticmethod
    def of(codebook: Pyramids) -> "PyramidsForm":
        return PyramidsForm(codebook.dim, codebook.bits, codebook.pulses, codebook.order)

    @staticmethod
    def from_json(fields: Fields) -> "PyramidsForm":
        order = fields.only("kind", "dim", "bits", "pulses", "order").choice("order", ORDERS)
        pulses = fields.integers("pulses", None, 1, MAX_PULSES, most=MAX_LEVELS)
        return PyramidsForm(fields.integer("dim", 1, MAX_VECTOR), fields.integer("bits", 1, 64), pulses, order).checked(fields)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "dim": self.dim, "bits": self.bits, "pulses": list(self.pulses), "order": self.order}

    def table(self, codebook: Pyramids) -> Float[Tensor, "levels 1"]:
        return codebook.scales[:, None]

    def codebook(self, table: Float[Tensor, "levels 1"]) -> Pyramids:
        return Pyramids(self.dim, self.pulses, table[:, 0], self.bits, self.order)


@dataclass(frozen=True)
class GainShapeForm(PyramidForm):
    pulses: int
    gains: int

    kind: ClassVar[str] = "gain_shape"

    @property
    def rows(self) -> int:
        return self.gains

    @staticmethod
    def of(codebook: GainShape) -> "GainShapeForm":
        return GainShapeForm(codebook.dim, codebook.pulses, codebook.gains.shape[0])

    @staticmethod
    def from_json(fields: Fields) -> "GainShapeForm":
        fields.only("kind", "dim", "pulses", "gains", "order").choice("order", (SPLIT,))
        form = GainShapeForm(
            fields.integer("dim", 1, MAX_VECTOR), fields.integer("pulses", 1, MAX_PULSES), fields.integer("gains", 2, 1 << 16)
        )
        return form.checked(fields)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "dim": self.dim, "pulses": self.pulses, "gains": self.gains, "order": SPLIT}

    def table(self, codebook: GainShape) -> Float[Tensor, "levels 1"]:
        return codebook.gains[:, None]

    def codebook(self, table: Float[Tensor, "levels 1"]) -> GainShape:
        return GainShape(self.dim, self.pulses, table[:, 0])


@dataclass(frozen=True)
class PulsesForm:
    """The words of pyramids spelled out: the level is the code, and the entries, `entry` bits each, lie in a tensor of their own."""

    dim: int
    pulses: tuple[int, ...]
    entry: int

    kind: ClassVar[str] = "pulses"

    @property
    def rows(self) -> int:
        return len(self.pulses)

    @property
    def widths(self) -> tuple[int, ...]:
        return (len(self.pulses).bit_length(),)

    def columns(self, size: int) -> int:
        if size != self.dim:
            raise ValueError(f"of {self.dim} weights, the dimension of the pyramids")
        return 1

    @staticmethod
    def of(codebook: Pulses) -> "PulsesForm":
        return PulsesForm(codebook.dim, codebook.pulses, 8)

    @staticmethod
    def from_json(fields: Fields) -> "PulsesForm":
        fields.only("kind", "dim", "pulses", "entry")
        dim, entry = fields.integer("dim", 2, MAX_VECTOR), fields.integer("entry", 4, 8)
        if dim % 2 or entry not in (4, 8):
            raise fields.fail("dim" if dim % 2 else "entry", "even" if dim % 2 else "4 or 8")
        return PulsesForm(dim, fields.integers("pulses", None, 1, MAX_ENTRY, most=MAX_LEVELS), entry)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "dim": self.dim, "pulses": list(self.pulses), "entry": self.entry}

    def table(self, codebook: Pulses) -> Float[Tensor, "levels 1"]:
        return codebook.scales[:, None]

    def codebook(self, table: Float[Tensor, "levels 1"]) -> Pulses:
        return Pulses(self.dim, self.pulses, table[:, 0])

    def store(self, codes: Int[Tensor, "rows cols t"]) -> Int[Tensor, "rows b"]:
        """The entries of spelled codes as bytes; two of 4 bits share one, number b below number b + dim / 2."""
        y = (codes[..., 1:].long() - max(self.pulses)).flatten(0, 1)
        low, high = -(1 << self.entry - 1), (1 << self.entry - 1) - 1
        if y.numel() and not low <= int(y.min()) <= int(y.max()) <= high:
            raise FormatError(f"entries of pulses from {int(y.min())} to {int(y.max())} do not fit into {self.entry} bits")
        if self.entry == 4:
            first, second = y.chunk(2, dim=1)
            y = ((first & 15 | second << 4) ^ 128) - 128  # of 8 bits, as a signed number
        return y.to(torch.int8).reshape(codes.shape[0], -1)

    def restore(self, levels: Int[Tensor, "rows cols 1"], stored: Int[Tensor, "rows b"]) -> Int[Tensor, "rows cols t"]:
        """Inverse of `store`; levels that do not exist are zero's."""
        y = stored.reshape(*levels.shape[:2], -1).to(torch.int16)
        if self.entry == 4:
            y = torch.cat([((y & 15) ^ 8) - 8, y >> 4], dim=2)
        return torch.cat([levels.clamp_max(len(self.pulses)).to(torch.int16), y + max(self.pulses)], dim=2)


CODEBOOKS = {form.kind: form for form in (GridForm, TableForm, ResidualForm, PyramidsForm, GainShapeForm, PulsesForm)}
"""Codebooks a file can hold, by the name in its config."""

_FORM_OF = {Grid: GridForm, Table: TableForm, Residual: ResidualForm, Pyramids: PyramidsForm, GainShape: GainShapeForm, Pulses: PulsesForm}


def form_of(codebook: Codebook) -> Form:
    """Raises FormatError for a codebook that no layout stores."""
    if type(codebook) not in _FORM_OF:
        raise FormatError(f"a {type(codebook).__name__} codebook cannot be stored; storable are {', '.join(CODEBOOKS)}")
    return _FORM_OF[type(codebook)].of(codebook)


def form_from_json(fields: Fields) -> Form:
    return CODEBOOKS[fields.choice("kind", CODEBOOKS)].from_json(fields)
