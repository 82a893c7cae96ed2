"""The peak is what the system says, and it grows with what is held."""

import subprocess
import sys

from voroq.pipeline.memory import peak_memory

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
