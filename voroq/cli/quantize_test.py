"""What voroq quantize hands to the library, and what it says of the result."""

import json

import pytest

from voroq.cli.cli_test import run
from voroq.cli.conftest import REPORT
from voroq.pipeline.effort import EFFORTS
from voroq.tuning.loop import Tuning


def test_quantize_passes_everything_on(library, capsys):
    argv = ["quantize", "in", "out", "--method", "gptq", "--bits", "3.2", "--option", "group-size=64", "-o", "damping = 0.02"]
    argv += ["--calibration", "c.txt", "--calibration", "d.txt"]
    argv += [ "--samples", "7", "--context", "33", "--mode", "sequential", "--device", "cpu", "--seed", "5", "--no-interleave"]
    assert run(*argv, "--resume", "--trust-remote-code", "--revision", "abc", "--json") == 0
    assert library.plan == ("gptq", 3.2, {"group_size": "64", "damping": "0.02"})
    args, kwargs = library.call
    assert args == (EFFORTS["fast"], "in", "out", "the plan")
    assert kwargs == {
        "calibration": ["c.txt", "d.txt"], "samples": 7, "context": 33, "mode": "sequential", "hessian": "auto", "interleave": False,
        "device": "cpu", "seed": 5, "resume": True, "revision": "abc", "trust_remote_code": True, "block_tuning": None,
        "teacher": None, "allocate": None, "own_text": None, "channels": None,
    }  # fmt: skip
    assert type(kwargs["mode"]) is str
    out, err = capsys.readouterr()
    assert json.loads(out) == REPORT
    assert "block 1/2  layers.0.q_proj  loss 0.0213  0.5 s  ETA" in err
    assert "warning: a [warning]" in err


def test_efforts_have_options_that_yield_to_the_users(library):
    run("quantize", "in", "out", "--effort", "best", "-o", "rounds=7")
    assert library.call[0][0] == EFFORTS["best"]
    assert library.plan == ("vptq", None, {**EFFORTS["best"].options["vptq"], "rounds": "7"})


def test_what_goes_before_a_run_is_passed_on(library):
    run("quantize", "in", "out", "--teacher", "whole", "--own-text", "0", "--channels", "700", "--no-allocate")
    assert library.call[1].items() >= {"teacher": "whole", "own_text": 0, "channels": 700, "allocate": False}.items()


@pytest.mark.parametrize(
    ("given", "effort"),
    [([], "balanced"), (["--method", "gptq"], "fast"), (["--tune-blocks", "9"], "fast"), (["--effort", "fast"], "fast")],
)
def test_what_the_effort_is_where_none_is_given(given, effort, library):
    run("quantize", "in", "out", *given)
    assert library.call[0][0] == EFFORTS[effort]


def test_steps_of_blocks_are_passed_on(library):
    run("quantize", "in", "out", "--tune-blocks", "7")
    assert library.call[1]["block_tuning"] == Tuning(steps=7) and library.call[0][0].tuning is None


def test_a_plan_comes_from_a_file(library, capsys):
    run("quantize", "in", "out", "--plan", "p.json", "--hessian", "two-sided")
    assert library.call[0][1:] == ("in", "out", "the plan in p.json") and library.call[1]["hessian"] == "two-sided"
    assert run("quantize", "in", "out", "--plan", "p.json", "--bits", "2") == 2
    assert "one or the other" in capsys.readouterr().err


def test_absent_bits_are_left_to_the_plan(library):
    run("quantize", "in", "out", "-o", "table_bits=8")
    assert library.plan == ("vptq", None, {"table_bits": "8"})


def test_quantize_without_json_says_what_was_made(library, capsys):
    run("quantize", "in", "out")
    out = capsys.readouterr().out
    assert "2.050" in out
    assert "1 min 15 s" in out
    assert "0.0900 -> 0.0500" in out
    assert "voroq eval out --against in" in out
