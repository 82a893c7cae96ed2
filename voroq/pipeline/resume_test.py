"""A run that is killed, at any moment, ends after `resume` with the bytes of one that was not; anything else is refused."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from voroq.errors import VoroqError
from voroq.pipeline.progress import Silent
from voroq.pipeline.tiny_runs_test import QUICK, content, quick_run, tiny_source, write_text

MARKS = ("replace", "unlink", "rmdir")
"""The system calls by which a run's files appear and disappear; a kill between two of them leaves what the first has left."""


def killed_run(source: Path, out: Path, mode: str, arm: Callable[[], None]) -> None:
    """In a process of its own that `arm` has made mortal: the run, until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            arm()
            quick_run(source, out, QUICK["gptq"], mode=mode)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def at_call(number: int, *, after: bool, count: list[int]) -> None:
    """Kill this process right before or after call `number` of one of the marks."""

    def mortal(call: Callable) -> Callable:
        def counted(*args: object, **kwargs: object) -> None:
            count[0] += 1
            if count[0] == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*args, **kwargs)
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        return counted

    for name in MARKS:
        setattr(os, name, mortal(getattr(os, name)))


def at_time(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def count_calls(source: Path, out: Path, mode: str) -> int:
    """Marks of a whole run."""
    originals, count = {name: getattr(os, name) for name in MARKS}, [0]
    at_call(-1, after=False, count=count)
    quick_run(source, out, QUICK["gptq"], mode=mode)
    for name, call in originals.items():
        setattr(os, name, call)
    return count[0]


def kill_and_resume(source: Path, folder: Path, mode: str) -> None:
    """Kill at every other mark (before it and after it in turn) and at random times: each resumed result is the uninterrupted one."""
    began = time.perf_counter()
    calls = count_calls(source, folder / mode, mode)
    lasted, expected = time.perf_counter() - began, content(folder / mode)
    assert calls > 12
    chance = random.Random(mode)
    arms = {f"call {k}": lambda k=k: at_call(k, after=k % 4 < 2, count=[0]) for k in range(1 + (mode == "parallel"), calls + 1, 2)}
    arms |= {f"time {k}": lambda t=chance.uniform(0.1, 1.0) * lasted: at_time(t) for k in range(2)}
    unfinished = 0
    for name, arm in arms.items():
        out = folder / f"{mode} {name}"
        killed_run(source, out, mode, arm)
        unfinished += (out / "voroq_run").exists()
        quick_run(source, out, QUICK["gptq"], mode=mode, resume=True)
        assert content(out) == expected, name
    assert unfinished > 5, unfinished


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    """In an interpreter of its own, where one thread does everything, so that it may fork."""
    call = f"""from voroq.pipeline.resume_test import *
folder = Path({str(tmp_path)!r})
source = tiny_source(folder / "in")
for mode in ("parallel", "sequential", "asymmetric"):
    kill_and_resume(source, folder, mode)"""
    done = subprocess.run([sys.executable, "-c", call], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class StopsAt(Silent):
    """A listener that interrupts the run when it comes to a block."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.quantized: list[str] = []

    def block(self, i: int, name: str) -> None:
        if i == self.index:
            raise KeyboardInterrupt

    def site(self, name: str, seconds: float, loss: float) -> None:
        self.quantized.append(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("in"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an uninterrupted sequential run makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quick_run(source, out, QUICK["gptq"], mode="sequential")
    return content(out)


@pytest.fixture(scope="module")
def unfinished(source, tmp_path_factory):
    """What is left of that run when it is interrupted at block 2."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.raises(KeyboardInterrupt):
        quick_run(source, out, QUICK["gptq"], mode="sequential", progress=StopsAt(2))
    return out


@pytest.fixture
def out(unfinished, tmp_path):
    """A copy of it for a test to continue or to damage."""
    return shutil.copytree(unfinished, tmp_path / "out")


def resume(source: Path, out: Path, **changes: object) -> list[str]:
    """Blocks that were quantized again."""
    ears = StopsAt(-1)
    quick_run(source, out, changes.pop("method", QUICK["gptq"]), **{"mode": "sequential", "resume": True, "progress": ears, **changes})
    return sorted({name.split(".")[2] for name in ears.quantized})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_finished_blocks_are_not_quantized_again(source, whole, out):
    assert resume(source, out) == ["2"]
    assert content(out) == whole


@pytest.mark.parametrize(
    ("damage", "redone"),
    [
        (lambda out: flip(out / "model-00002-of-00004.safetensors"), ["0", "2"]),
        (lambda out: (out / "model-00003-of-00004.safetensors").unlink(), ["1", "2"]),
        (lambda out: (out / "voroq_run" / "block-00000.json").write_text("{"), ["0", "2"]),
        (lambda out: (out / "voroq_run" / "block-00001.json").unlink(), ["1", "2"]),
        (lambda out: flip(out / "model-00001-of-00004.safetensors"), ["2"]),
    ],
)
def test_what_is_damaged_is_redone(source, whole, out, damage, redone):
    damage(out)
    assert resume(source, out) == redone
    assert content(out) == whole


def test_a_hole_in_the_middle_is_filled_without_touching_later_blocks(source, whole, out):
    flip(out / "model-00002-of-00004.safetensors")
    with pytest.raises(KeyboardInterrupt):
        resume(source, out, progress=StopsAt(1))
    assert resume(source, out) == ["2"]
    assert content(out) == whole


def test_resuming_before_anything_was_written_is_starting(source, whole, tmp_path):
    assert resume(source, tmp_path / "out") == ["0", "1", "2"]
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": QUICK["rtn"]}, r"methods\[model.layers.0.self_attn.q_proj\] was GPTQ.* is RTN"),
        ({"mode": "parallel"}, "mode was sequential when the run was started and is parallel now"),
        ({"seed": 1}, "calibration was 6 windows|seed was 0"),
        ({"samples": 5}, "calibration was 6 windows of 16 tokens .* is 5 windows"),
        ({"context": 15}, "calibration was 6 windows of 16 tokens .* is 6 windows of 15"),
    ],
)
def test_other_settings_are_refused_by_name(source, out, changes, named):
    before = content(out)
    with pytest.raises(VoroqError, match=named) as caught:
        resume(source, out, **changes)
    assert "\n" not in str(caught.value)
    assert content(out) == before


def test_another_text_or_another_model_is_refused(source, out, tmp_path):
    with pytest.raises(VoroqError, match="calibration was"):
        resume(source, out, calibration=write_text(tmp_path / "other.txt", seed=1))
    other = tiny_source(tmp_path / "other", num_hidden_layers=3)
    (shard,) = other.glob("*.safetensors")
    flip(shard)
    with pytest.raises(VoroqError, match=r"source\[files\]\[model.safetensors\]"):
        resume(other, out)


def test_an_unfinished_run_is_continued_only_when_asked(source, out):
    with pytest.raises(VoroqError, match="unfinished run; continue it with --resume"):
        quick_run(source, out, QUICK["gptq"], mode="sequential")


def test_a_finished_run_is_returned_as_it_is(source, tmp_path):
    out = tmp_path / "out"
    report = quick_run(source, out)
    before = content(out)
    with pytest.raises(VoroqError, match="already holds a finished voroq model"):
        quick_run(source, out)
    assert quick_run(source, out, resume=True) == report
    with pytest.raises(VoroqError, match="methods"):
        quick_run(source, out, QUICK["gptq"], resume=True)
    assert content(out) == before
    flip(out / "model-00003-of-00004.safetensors")
    with pytest.raises(VoroqError, match=r"00003-of-00004.* was changed after the run"):
        quick_run(source, out, resume=True)


def test_a_kill_while_the_journal_goes_leaves_a_finished_run(source, tmp_path):
    out = tmp_path / "out"
    report = quick_run(source, out)
    (out / "voroq_run").mkdir()
    (out / "voroq_run" / "block-00001.json").write_text("{}")
    assert quick_run(source, out, resume=True) == report
    assert not (out / "voroq_run").exists()


def test_damaged_settings_are_said(source, out):
    (out / "voroq_run" / "settings.json").write_text("[]")
    with pytest.raises(VoroqError, match=r"settings.json is damaged"):
        resume(source, out)


def test_what_is_written_already_needs_no_room_again(source, whole, out, tmp_path, monkeypatch):
    half = sum(path.stat().st_size for path in out.glob("*.safetensors")) // 2
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=half + (1 << 20)))
    with pytest.raises(VoroqError, match="free some space"):
        quick_run(source, tmp_path / "other", QUICK["gptq"])
    resume(source, out)
    assert content(out) == whole
