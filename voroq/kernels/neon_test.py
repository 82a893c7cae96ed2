"""The library as ARM machines get it: cross-compiled, and every instruction set against the portable one in an emulator.

Needs a cross compiler and qemu's user mode (Debian: g++-aarch64-linux-gnu, qemu-user); skipped, with the reason, where they are missing.
"""

import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-Wno-psabi", "-fno-math-errno", "-fno-signed-zeros", "-ffp-contract=fast"]
"""Those of the build but for the level: at its own, the compiler takes minutes."""


def units(machine: str) -> dict[Path, list[str]]:
    """What the package's build compiles for a machine, and the flags."""
    spec = importlib.util.spec_from_file_location("csrc_build", CSRC / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.units(CSRC / "cpu", machine)


@pytest.mark.skipif(not CSRC.is_dir(), reason="no sources beside the package")
def test_every_machine_gets_its_instruction_sets():
    x86, arm, other = (units(machine) for machine in ("x86_64", "aarch64", "riscv64"))
    assert {path.stem for path in x86} - {path.stem for path in other} == {"isa_avx2", "isa_avx512", "isa_avx512bf16"}
    assert {path.stem for path in arm} - {path.stem for path in other} == {"isa_neon"}
    assert {path.stem for path in other} == {"dispatch", "step", "sweeps", "isa_portable"}
    assert not any(arm.values()) and not any(other.values())
    assert {path.stem for path, flags in x86.items() if "-mavx512bf16" in flags} == {"isa_avx512bf16"}


@pytest.mark.skipif(not CSRC.is_dir(), reason="no sources beside the package")
@pytest.mark.skipif(shutil.which(COMPILER) is None or shutil.which(EMULATOR[0]) is None, reason=f"needs {COMPILER} and {EMULATOR[0]}")
def test_neon_in_an_emulator(tmp_path: Path):
    objects = {source: tmp_path / f"{source.stem}.o" for source in (*units("aarch64"), CSRC / "parity.cpp")}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: run(COMPILER, *FLAGS, "-c", source, "-o", objects[source]), objects))
    run(COMPILER, "-o", tmp_path / "parity", *objects.values(), "-ldl", "-pthread")
    said = run(*EMULATOR, tmp_path / "parity")
    assert "comparisons with portable hold: neon" in said
    assert int(said.split()[0]) == int(said.split()[2]) > 2000


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
