"""Older VPTQ layouts, and how a linear stored in one becomes a linear of the current layout (`docs/format.md`, 2.5).

    modern(Packed(old, old.pack(q, dtype))) == Packed(old.current, old.current.pack(q, dtype))        bit for bit

An `OldSpec` is a `Spec` like any other: layers can be built from it, files checked against it, and its tensors unpacked. Only
loaders and `voroq convert` know that there is something better to do with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from voroq.numerics.bits import merge_streams, pack_bits, split_streams, unpack_bits
from voroq.packed.base import Packed, Role, Stored, as_int16, from_int16
from voroq.packed.vptq_format import VptqSpec
from voroq.quantized import Quantized

_CODES = ("indices", "res_indices", "outlier_indices")


@dataclass(frozen=True)
class OldSpec:
    """A linear that the current layout would store as `current`.

    `unpacked`: main and residual codes are one 16-bit number each, in `indices` and `res_indices`. `floats`: 16-bit codes may
    be there as float16 of the same bits (NCCL moves no unsigned integers). At least one of the two.
    """

    current: VptqSpec
    unpacked: bool
    floats: bool

    method: ClassVar[str] = "vptq"
    activations: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.current.shape

    def layout(self) -> tuple[Stored, ...]:
        dtypes = (torch.float16, torch.int16) if self.floats else (torch.int16, torch.uint16)
        stored = []
        for tensor in self.current.layout():
            if tensor.name == "outlier_indices":
                tensor = Stored(tensor.name, tensor.shape, Role.CODES, dtypes, tensor.limit)
            elif tensor.name == "indices" and self.unpacked:
                shape = (*tensor.shape[:2], self.current.group_size)
                stored += [Stored(*entry) for entry in zip(*self._streams(shape, dtypes), strict=True)]
                continue
            elif tensor.name == "perm" and self.unpacked:
                tensor = Stored(tensor.name, tensor.shape, tensor.role, (torch.int64, torch.int32, torch.int16))
            stored.append(tensor)
        return tuple(stored)

    def _streams(self, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Any:
        sizes = [self.current.k] if self.current.residual is None else [self.current.k, self.current.residual]
        count = len(sizes)
        return _CODES[:count], [shape] * count, [Role.CODES] * count, [dtypes] * count, sizes

    def to_json(self, *, bias: bool = False) -> dict[str, Any]:
        return self.current.to_json(bias=bias) | {"is_indice_packed": not self.unpacked, "indices_as_float": self.floats}

    def pack(self, q: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
        """What old writers wrote; kept for tests and as the other half of `unpack`."""
        tensors = self.current.pack(q, dtype)
        if self.unpacked:
            widths, g = self.current.widths, self.current.group_size
            codes = torch.stack([split_streams(unpack_bits(t, sum(widths), g).long(), widths) for t in tensors["indices"]])
            tensors |= {name: as_int16(codes[..., i]) for i, name in enumerate(_CODES[: len(widths)])}
            if "perm" in tensors:
                tensors["perm"] = from_int16(tensors["perm"])
        if self.floats:
            short = [name for name in _CODES if name in tensors and tensors[name].dtype == torch.int16]
            tensors |= {name: tensors[name].view(torch.float16) for name in short}
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor]) -> Quantized:
        return self.current.unpack(self.to_current(tensors))

    def to_current(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of `current`. The codes must be below the sizes of their tables."""
        new = dict(tensors)
        if self.unpacked:
            widths = self.current.widths
            streams = [from_int16(new.pop(name)) for name in _CODES[: len(widths)]]
            new["indices"] = torch.stack([pack_bits(merge_streams(codes, widths), sum(widths)) for codes in torch.stack(streams, dim=-1)])
        return new


def vptq_from_json(data: Any, module: str, shape: tuple[int, int] | None = None) -> VptqSpec | OldSpec:
    """The spec of `module` in whichever layout its entry names; errors as `VptqSpec.from_json`."""
    if not isinstance(data, dict):
        return VptqSpec.from_json(data, module, shape)
    unpacked, floats = data.get("is_indice_packed") is False, data.get("indices_as_float") is True
    known = data | ({"is_indice_packed": True} if unpacked else {}) | ({"indices_as_float": False} if floats else {})
    current = VptqSpec.from_json(known, module, shape)
    if unpacked or (floats and current.outliers is not None):
        return OldSpec(current, unpacked, floats)
    return current


def modern(packed: Packed) -> Packed:
    """The same linear in the current layout, integers in the types that writers use. A packed linear that is so already is returned.

    The dequantized weight is the same bit for bit.
    """
    spec, tensors = packed.spec, packed.tensors
    if isinstance(spec, OldSpec):
        spec, tensors = spec.current, spec.to_current(tensors)
    wide = {s.name for s in spec.layout() if not s.real and tensors[s.name].dtype != s.dtypes[0]}
    if spec is packed.spec and not wide:
        return packed
    return Packed(spec, {s.name: as_int16(from_int16(tensors[s.name])) if s.name in wide else tensors[s.name] for s in spec.layout()})
