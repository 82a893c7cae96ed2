"""The shape of a codebook as JSON, and its numbers as one table [rows dim].

    {"kind": "grid", "bits": 3}    {"kind": "table", "k": 256}    {"kind": "residual", "k": [65536, 256]}

A residual's stages lie below each other in one table, main first.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.codebook.base import Codebook
from voroq.codebook.grid import Grid
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.errors import FormatError
from voroq.packed.base import MAX_TABLE, Fields


@runtime_checkable
class Form(Protocol):
    kind: ClassVar[str]
    widths: tuple[int, ...]
    """Bits of each stream."""
    rows: int
    """Rows of the stored table; 0 when the words are known without one."""

    def to_json(self) -> dict[str, Any]: ...

    def table(self, codebook: Any) -> Tensor: ...

    def codebook(self, table: Tensor) -> Codebook: ...


@dataclass(frozen=True)
class GridForm:
    bits: int

    kind: ClassVar[str] = "grid"
    rows: ClassVar[int] = 0

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


CODEBOOKS = {"grid": GridForm, "table": TableForm, "residual": ResidualForm}
"""Codebooks a file can hold, by the name in its config."""

_FORM_OF = {Grid: GridForm, Table: TableForm, Residual: ResidualForm}


def form_of(codebook: Codebook) -> Form:
    """Raises FormatError for a codebook that no layout stores."""
    if type(codebook) not in _FORM_OF:
        raise FormatError(f"a {type(codebook).__name__} codebook cannot be stored; storable are {', '.join(CODEBOOKS)}")
    return _FORM_OF[type(codebook)].of(codebook)


def form_from_json(fields: Fields) -> Form:
    return CODEBOOKS[fields.choice("kind", CODEBOOKS)].from_json(fields)
