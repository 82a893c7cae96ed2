"""Builds the CPU kernels while the package is built. Without a C++ compiler, or where the build fails, there is none, and it says so:
the package works without (`voroq doctor`).

The library has a C interface, so a wheel serves every Python. One file per instruction set, each with its own flags; the library
chooses among them when it is loaded.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "libvoroq_cpu.so"
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-fno-math-errno", "-fno-signed-zeros", "-ffp-contract=fast"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86 = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
SETS = {"x86_64": X86, "AMD64": X86, "aarch64": {"neon": []}, "arm64": {"neon": []}}
"""Flags of the instruction sets of a machine, beside the portable one; each has its file, isa_NAME.cpp."""


class CpuKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        try:
            build(root / "csrc" / "cpu", root / "voroq" / NAME)
        except Exception as problem:
            (root / "voroq" / NAME).unlink(missing_ok=True)
            self.app.display_warning(f"voroq is installed without its CPU kernels and will be slow: {problem}")
            return
        build_data["artifacts"].append(f"voroq/{NAME}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def build(sources: Path, target: Path) -> None:
    """Compile and link `sources` into `target`. Raises RuntimeError saying what is missing."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None)
    if sys.platform == "win32" or compiler is None:
        raise RuntimeError("no C++ compiler was found; install g++ or clang++ and install again")
    own = units(sources, platform.machine())
    with TemporaryDirectory() as folder:
        objects = {path: Path(folder) / f"{path.stem}.o" for path in own}
        commands = [[compiler, *FLAGS, *own[path], "-c", path, "-o", into] for path, into in objects.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        built = Path(folder) / NAME
        _run([compiler, "-shared", "-o", built, *objects.values(), "-ldl", "-pthread"])
        staged = target.with_suffix(".tmp")
        shutil.copy(built, staged)
        staged.replace(target)


def units(sources: Path, machine: str) -> dict[Path, list[str]]:
    """The files that are compiled for `machine`, and the flags of its instruction sets for those that need them."""
    sets = {**SETS.get(machine, {}), "portable": []}
    names = {path: path.stem.removeprefix("isa_") for path in sorted(sources.glob("*.cpp"))}
    return {path: sets.get(name, []) for path, name in names.items() if name == path.stem or name in sets}


def _run(command: list[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:1]))} failed: {done.stderr.strip()[-2000:]}")
