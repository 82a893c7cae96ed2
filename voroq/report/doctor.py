"""What this installation can do: versions, devices, the kernels found, and whether each computes what it should here."""

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from voroq import native
from voroq.codebook.presets import preset
from voroq.kernels import KERNELS, reference
from voroq.packed.base import Packed, Spec
from voroq.packed.codebooks import GridForm, PyramidsForm, TableForm
from voroq.packed.native_format import NativeSpec, Run
from voroq.packed.random import random_packed
from voroq.packed.vptq_format import Outliers, VptqSpec
from voroq.quantized import Tile

PACKAGES = ("voroq", "torch", "transformers", "accelerate", "safetensors", "triton")
TOLERANCE = 1e-5
"""Largest difference to the reference in float32, relative to the largest output."""
BATCHES = (1, 5, 40)

_UNION = PyramidsForm.of(preset(16, 48))
SPECS: dict[str, Spec] = {
    "vptq v8 k256+256, groups": VptqSpec((136, 320), 8, 256, 256, 2, None, True, False),
    "vptq v6 k4096, outliers, perm, norm": VptqSpec((133, 304), 6, 4096, None, 1, Outliers(4, 4, 16), True, True),
    "vptq v8 k65536": VptqSpec((96, 288), 8, 1 << 16, None, 1, None, False, True),
    "grid 3 bit g64": NativeSpec((131, 320), ("permute",), (Run(5, 64, Tile(1, 1), GridForm(3), True, True),)),
    "pyramids 16x1 3 bit, rotated": NativeSpec((144, 320), ("rotate_in",), (Run(1, 320, Tile(16, 1), _UNION, True, False),)),
    "pyramids 1x16 3 bit": NativeSpec((131, 320), (), (Run(1, 320, Tile(1, 16), _UNION, True, False),)),
    "table 1x8 k256": NativeSpec((131, 320), (), (Run(1, 320, Tile(1, 8), TableForm(256), True, False),)),
}
"""One linear for each way a kernel can go."""


@dataclass(frozen=True)
class SelfTest:
    """`error` is the largest difference to the reference, relative to the largest output; None where the kernel leaves it to another."""

    kernel: str
    spec: str
    error: float | None

    @property
    def passed(self) -> bool:
        return self.error is None or self.error <= TOLERANCE


@dataclass(frozen=True)
class Diagnosis:
    versions: dict[str, str | None]
    system: str
    devices: list[str]
    cpu_library: str | None
    cpu_problem: str | None
    tests: list[SelfTest]

    @property
    def healthy(self) -> bool:
        return all(test.passed for test in self.tests)


def diagnose() -> Diagnosis:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    cuda = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return Diagnosis(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        system=f"{sys.platform} {platform.machine()}",
        devices=[f"cpu {threads}", *cuda],
        cpu_library=", ".join(native.isas()) or None,
        cpu_problem=native.problem(),
        tests=[_test(kernel, name, spec) for kernel in KERNELS if kernel != "reference" for name, spec in SPECS.items()],
    )


def _test(kernel: str, name: str, spec: Spec) -> SelfTest:
    device = "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"
    packed, errors = random_packed(spec, torch.float32), []
    packed = Packed(spec, {name: tensor.to(device) for name, tensor in packed.tensors.items()})
    for batch in BATCHES:
        x = torch.randn(batch, spec.shape[1], generator=torch.Generator().manual_seed(batch)).to(device)
        if not KERNELS[kernel].supports(spec, x):
            return SelfTest(kernel, name, None)
        expected = x.double() @ reference.weight(packed, torch.float64).T
        errors.append(float((KERNELS[kernel].matmul(x, packed) - expected).abs().max() / expected.abs().max()))
    return SelfTest(kernel, name, max(errors))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def diagnosis_view(found: Diagnosis) -> Group:
    facts = Table(show_header=False, box=None)
    for name, number in found.versions.items():
        facts.add_row(name, number or "not installed")
    facts.add_row("system", found.system)
    facts.add_row("devices", "\n".join(found.devices))
    facts.add_row("CPU kernels", found.cpu_library or Text(f"none: {found.cpu_problem}", style="yellow"))
    tests = Table("kernel", "linear", "error", "allowed", "")
    for test in found.tests:
        verdict = Text("left to the reference", style="dim") if test.error is None else Text("ok", style="green")
        tests.add_row(
            *(test.kernel, test.spec, "-" if test.error is None else f"{test.error:.1e}", f"{TOLERANCE:.0e}"),
            verdict if test.passed else Text("WRONG", style="bold red"),
        )
    return Group(facts, tests)
