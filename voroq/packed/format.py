"""The front door of the packed formats.

    unpack(pack(q, dtype, layout)) == narrow(q, dtype)          bit for bit, for every q the layout can hold

`pack` narrows first (tables, scales and shifts become `dtype`, as `narrow` does), so nothing is lost after that. Two layouts:
"vptq", the official checkpoint format, and "voroq", the native one.
"""

from math import prod
from typing import Any

import torch

from voroq.errors import FormatError
from voroq.packed.base import Packed, Role, Spec
from voroq.packed.legacy import OldSpec, vptq_from_json
from voroq.packed.native_format import NativeSpec
from voroq.packed.vptq_format import VptqSpec
from voroq.quantized import Quantized, narrow

LAYOUTS = {"vptq": VptqSpec, "voroq": NativeSpec}
"""Layouts by their `quant_method` in config.json."""


def pack(q: Quantized, dtype: torch.dtype, layout: str) -> Packed:
    """`q` as stored in `layout`. Raises FormatError when the layout cannot hold it, ValueError when a value does not fit in `dtype`."""
    spec = spec_type(layout).of(q)
    return Packed(spec, spec.pack(narrow(q, dtype), dtype))


def unpack(packed: Packed) -> Quantized:
    """The quantized linear, real tensors in float32."""
    return packed.spec.unpack(packed.tensors)


def spec_type(layout: str) -> type[VptqSpec] | type[NativeSpec]:
    if layout not in LAYOUTS:
        raise FormatError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def spec_from_json(layout: str, data: Any, module: str, shape: tuple[int, int] | None = None) -> VptqSpec | OldSpec | NativeSpec:
    """The spec of a config's entry for `module`, old layouts included. Raises FormatError naming module and field.

    `shape` (out, in) of the model's linear, if known, must agree.
    """
    read = vptq_from_json if spec_type(layout) is VptqSpec else NativeSpec.from_json
    return read(data, module, shape)


def total_bytes(packed: Packed) -> int:
    """Bytes stored for codes, tables, scales, zeros and permutation; the linear's own bias is not part of it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors.values())


def code_bytes(packed: Packed) -> int:
    """The share of `total_bytes` that are codes and zero points."""
    names = {stored.name for stored in packed.spec.layout() if stored.role is Role.CODES}
    return sum(tensor.numel() * tensor.element_size() for name, tensor in packed.tensors.items() if name in names)


def spec_bytes(spec: Spec, real: torch.dtype) -> int:
    """`total_bytes` before there are tensors, tables and scales being `real`."""
    return sum(prod(stored.shape) * (real if stored.real else stored.dtypes[0]).itemsize for stored in spec.layout())


def bits_per_weight(packed: Packed) -> float:
    """Everything stored, per weight of the linear."""
    return 8 * total_bytes(packed) / prod(packed.spec.shape)
