"""The examples run, in the suite."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import own_method
import quantize_and_load

from voroq.errors import VoroqError


def test_quantize_and_load(tmp_path, monkeypatch):
    fast = {"kmeans_steps": 2, "rounds": 0}
    monkeypatch.setattr(quantize_and_load, "VPTQ", lambda **fields: quantize_and_load.voroq.VPTQ(**fields, **fast))
    assert quantize_and_load.main(str(tmp_path / "out"), samples=8).startswith("The sea was")


def test_own_method(tmp_path):
    # one bit a weight, and a 16-bit scale per row and a two-word table per matrix
    assert 1.0 < own_method.main(str(tmp_path / "out")) < 1.1
    with pytest.raises(VoroqError, match="finished"):
        own_method.main(str(tmp_path / "out"))
