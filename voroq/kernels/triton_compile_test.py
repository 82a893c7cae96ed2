"""Every kernel compiles for GPUs that need not be there, and keeps what it works on in registers.

Compiling needs Triton without its interpreter: the test runs this file in a process of its own. `launches` and `compiled` are also how to
look at the machine code: `compiled(launch, 90).asm["ptx"]`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
POINTERS |= {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    """What one launch would be called with; all but tensors (in tuples, or tuples of those), `batch` and `rows` are constants."""

    kernel: Any
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


def launches(linears: list, x: Tensor) -> list[Launch]:
    """What products of packed `linears` with one `x` launch on a GPU of 132 multiprocessors, in order; nothing runs."""
    from voroq.kernels import triton_kernel, triton_plan, triton_product, triton_tables

    found: list[Launch] = []

    class Recorder:
        def __init__(self, name: str, home) -> None:
            self.name, self.kernel = name, getattr(home, name)

        def __getitem__(self, grid: tuple[int, ...]):
            names = self.kernel.arg_names
            return lambda *args, **options: found.append(Launch(self.kernel, self.name, grid, dict(zip(names, args, strict=True)), options))

    with ExitStack() as stack:
        for name, home in {"widen": triton_tables, **dict.fromkeys(("thin", "wide", "arrange", "collect"), triton_product)}.items():
            stack.enter_context(patch.object(home, name, Recorder(name, home)))
        stack.enter_context(patch.object(triton_plan, "WORTH", 0))
        stack.enter_context(patch.object(triton_kernel, "_device", lambda device: ("none", 132)))
        triton_plan.plan.cache_clear()
        triton_kernel.matmuls(x, linears)
    return found


def compiled(launch: Launch, capability: int):
    """`launch` compiled for NVIDIA GPUs of `capability` (90: Hopper)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    def typed(value: Any, path: tuple[Any, ...], name: str) -> Any:
        if isinstance(value, tuple) and not name.isupper():
            return tuple(typed(each, (*path, i), name) for i, each in enumerate(value))
        if isinstance(value, Tensor):
            aligned[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if name in ("batch", "rows"):
            return "i32"
        constants[path] = value
        return "constexpr"

    aligned, constants = {}, {}
    signature = {name: typed(value, (i,), name) for i, (name, value) in enumerate(launch.arguments.items())}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def accepted(launch: Launch) -> bool:
    """Whether Triton itself, called as on a GPU of capability 90, makes the kernel that `compiled` makes of the arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Absent:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Absent())
    made = launch.kernel.warmup(*launch.arguments.values(), grid=launch.grid, **launch.options)
    return made.asm["ptx"].count(".entry") == 1


def stack(cubin: bytes) -> int:
    """Bytes a thread keeps outside of registers."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", usage))


def main() -> None:
    from voroq.packed.codebooks import GridForm, PyramidsForm
    from voroq.packed.native_format import NativeSpec, Run
    from voroq.packed.random import random_packed
    from voroq.packed.vptq_format import Outliers, VptqSpec
    from voroq.quantized import Tile

    table, grid, pyramids = specs = [
        VptqSpec((1000, 256), 6, 256, 16, 2, Outliers(12, 4, 16), True, True),
        NativeSpec((256, 256), ("permute",), (Run(2, 128, Tile(1, 1), GridForm(3), True, True),)),
        NativeSpec((256, 256), (), (Run(1, 256, Tile(8, 1), PyramidsForm(8, 40, (50, 20)), True, False),)),
    ]
    found = []
    for place, own in enumerate([*([spec] for spec in specs), [table, grid, replace(grid, shape=(64, 256)), pyramids]]):
        linears = [random_packed(spec, torch.float16) for spec in own]
        for batch in (1, 16):
            for launch in launches(linears, torch.zeros(batch, 256, dtype=torch.float16)):
                code = compiled(launch, 80 if batch == 1 else 90).asm
                assert len(own) == 1 or accepted(launch)
                found.append([place, batch, launch.name, "mma" in code["ptx"], stack(code["cubin"])])
    sys.stdout.write(json.dumps(found))


@pytest.mark.slow
def test_every_kernel_compiles_and_many_rows_go_through_tensor_cores():
    known = {**os.environ, "TRITON_INTERPRET": "0", "VOROQ_KERNEL": "", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {(place, batch) for place, batch, *_ in found} == {(place, batch) for place in range(4) for batch in (1, 16)}
    assert [name for place, batch, name, _, _ in found if (place, batch) == (3, 1)].count("thin") == 1
    assert {name for _, _, name, _, _ in found} == {"widen", "thin", "wide", "arrange", "collect"}
    assert all(mma == (name == "wide") and stack == 0 for _, _, name, mma, stack in found), found


if __name__ == "__main__":
    main()
