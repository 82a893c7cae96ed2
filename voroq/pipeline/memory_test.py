"""The peak is what the system says, and it grows with what is held."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voroq.pipeline.memory import free_memory, peak_memory

CODE = """
from voroq.pipeline.memory import peak_memory
before = peak_memory()["rss"]
held = bytearray(300_000_000)
held[::4096] = b"x" * len(held[::4096])
print(peak_memory()["rss"] - before)
"""


def test_three_hundred_megabytes_show():
    grown = int(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
    assert 250_000_000 < grown < 400_000_000


def test_keys():
    assert set(peak_memory()) == {"rss", "cuda"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says")
def test_free_memory_is_some_and_less_than_there_is():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory(torch.device("cpu")) < total


FREED = """
from pathlib import Path
from voroq.pipeline.memory import give_back
def resident():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1])
held = [b"x" * 100_000 for _ in range(2000)]
pinned = held[-1]
del held
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_goes_back():
    assert int(subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True).stdout) > 150_000
