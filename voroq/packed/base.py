"""What every layout shares: named stored tensors, the protocol of a spec, and checks of values that come from a file.

A spec is one linear's description without tensors. It is JSON in `config.json`, and everything needed to build the layer on
the meta device: name, shape and dtype of each stored tensor. Values read from JSON are hostile until checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from voroq.activations import Activations
from voroq.errors import FormatError
from voroq.quantized import Quantized

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

MAX_SIDE = 1 << 22
"""Rows or columns of one linear."""
MAX_VECTOR = 64
"""Weights per vector."""
MAX_TABLE = 1 << 16
"""Centroids of one table."""
MAX_ELEMENTS = 1 << 34
"""Elements of one stored tensor."""
MAX_NAME = 512
"""Characters of a module's or tensor's name."""


class Role(Enum):
    CODES = "codes"
    TABLE = "table"
    SCALE = "scale"
    PERM = "perm"


@dataclass(frozen=True)
class Stored:
    """One tensor of a packed linear. `name` is relative to the module; `dtypes` are those a file may use, any float by default.

    `limit`: the values, read as unsigned, must be below it (None where the width of the field already says so).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    dtypes: tuple[torch.dtype, ...] = FLOATS
    limit: int | None = None

    @property
    def real(self) -> bool:
        return self.dtypes == FLOATS


@runtime_checkable
class Spec(Protocol):
    """A linear's layout on disk. `method` is the `quant_method` whose files it lives in."""

    method: ClassVar[str]
    shape: tuple[int, int]
    activations: Activations | None
    """What becomes of the linear's inputs; None leaves them as they are."""

    def layout(self) -> tuple[Stored, ...]:
        """Every stored tensor, the linear's own bias excepted."""

    def to_json(self, *, bias: bool = False) -> dict[str, Any]:
        """The entry of `config.json`; `bias` says whether the linear has one, for layouts that record it."""

    def pack(self, q: Quantized, dtype: torch.dtype) -> dict[str, Tensor]: ...

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quantized: ...


@dataclass(frozen=True)
class Packed:
    """One linear as it is stored: what `spec.layout()` names, no more and no less."""

    spec: Spec
    tensors: Mapping[str, Tensor] = field(repr=False)


def as_int16(values: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """0..65535 as the two's complement int16 with the same bits."""
    return torch.where(values >= 1 << 15, values - (1 << 16), values).to(torch.int16)


def from_int16(values: Shaped[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Inverse of `as_int16`; float16 are such numbers under another name, other integers pass unchanged."""
    if values.dtype == torch.float16:
        values = values.view(torch.int16)
    return values.long() & 0xFFFF if values.dtype == torch.int16 else values.long()


def is_name(name: str) -> bool:
    """Whether a file may call a module or tensor so; messages quote names."""
    return len(name) <= MAX_NAME and name.isprintable()


class Fields:
    """A JSON object from a file, read field by field. Every complaint names the module and the field."""

    def __init__(self, data: Any, module: str) -> None:
        if not isinstance(data, dict):
            raise FormatError(f"quantization config of {module}: an object is needed, got {type(data).__name__}")
        self.data, self.module = data, module

    def fail(self, name: str, need: str) -> FormatError:
        return FormatError(f"quantization config of {self.module}: {name} must be {need}, got {self.data.get(name)!r:.60}")

    def only(self, *known: str) -> "Fields":
        unknown = sorted(set(self.data) - set(known))
        if unknown:
            raise FormatError(f"quantization config of {self.module}: unknown field {unknown[0]!r:.60}; a newer voroq may read it")
        return self

    def integer(self, name: str, low: int, high: int) -> int:
        return self._integer(name, self.data.get(name), low, high)

    def integers(self, name: str, count: int | None, low: int, high: int, *, most: int = 8) -> tuple[int, ...]:
        """A list of `count` integers (1 to `most` when None), each low..high."""
        values = self.data.get(name)
        if not isinstance(values, list) or (len(values) != count if count else not 1 <= len(values) <= most):
            raise self.fail(name, f"a list of {count or f'1 to {most}'} integers")
        return tuple(self._integer(name, value, low, high) for value in values)

    def table_sizes(self, name: str) -> tuple[int, ...]:
        sizes = self.integers(name, None, 2, MAX_TABLE)
        if any(size & (size - 1) for size in sizes) or prod(sizes) > 1 << 32:
            raise self.fail(name, "powers of two with a product of at most 2**32")
        return sizes

    def boolean(self, name: str) -> bool:
        value = self.data.get(name)
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def choice(self, name: str, choices: Any) -> str:
        value = self.data.get(name)
        if not isinstance(value, str) or value not in choices:
            raise self.fail(name, f"one of {', '.join(choices)}")
        return value

    def nested(self, name: str) -> "Fields":
        return Fields(self.data.get(name), f"{self.module}, {name}")

    def objects(self, name: str, limit: int) -> list["Fields"]:
        values = self.data.get(name)
        if not isinstance(values, list) or len(values) > limit:
            raise self.fail(name, f"a list of at most {limit} objects")
        return [Fields(value, f"{self.module}, {name}[{i}]") for i, value in enumerate(values)]

    def _integer(self, name: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name, f"an integer from {low} to {high}")
        return value


def check_bounds(spec: Spec, module: str) -> None:
    """Refuse a few lines of JSON that ask for more memory than any real linear."""
    for stored in spec.layout():
        if prod(stored.shape) > MAX_ELEMENTS:
            shape = list(stored.shape)
            raise FormatError(f"quantization config of {module}: {stored.name} would have shape {shape}, more than {MAX_ELEMENTS} elements")
