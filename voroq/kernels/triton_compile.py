"""Kernels compiled for a GPU that need not be there: what Triton accepts, and what the machine code costs.

    for launch in launches(packed, batch=1): compiled(launch, 90).asm["ptx"]
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from voroq.kernels import triton_kernel, triton_product
from voroq.packed.base import Packed

KERNELS = ("thin", "wide", "arrange", "collect")
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


def launches(packed: Packed, x: Tensor) -> list[Launch]:
    """What `triton_kernel.matmul(x, packed)` would launch, in order; nothing runs."""
    found: list[Launch] = []
    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(patch.object(triton_product, name, _Recorder(name, getattr(triton_product, name).arg_names, found)))
        triton_kernel.matmul(x, packed)
    return found


def compiled(launch: Launch, capability: int, warps: int = 32) -> Any:
    """`launch` compiled for NVIDIA GPUs of `capability` (90: Hopper); `.asm` has "ttgir", "ptx", "cubin"."""
    kernel = getattr(triton_product, launch.kernel)
    signature, constants = {}, {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif name == "batch":
            signature[name] = "i32"
        else:
            signature[name], constants[name] = "constexpr", value
    aligned = {(place,): [["tt.divisibility", 16]] for place, value in enumerate(launch.arguments.values()) if isinstance(value, Tensor)}
    return compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", capability, 32), options=launch.options)


class _Recorder:
    def __init__(self, name: str, arguments: list[str], into: list[Launch]) -> None:
        self.name, self.arguments, self.into = name, arguments, into

    def __getitem__(self, grid: tuple[int, ...]):
        def record(*args: Any, **options: int) -> None:
            self.into.append(Launch(self.name, grid, dict(zip(self.arguments, args, strict=True)), options))

        return record
