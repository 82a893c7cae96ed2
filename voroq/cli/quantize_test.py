"""What voroq quantize hands to the library, and what it says of the result."""

import json

import pytest

from voroq.cli.cli_test import run
from voroq.cli.conftest import REPORT
from voroq.pipeline.effort import EFFORTS
from voroq.pipeline.plan import Budget
from voroq.tuning.loop import Tuning


def test_quantize_passes_everything_on(library, capsys):
    argv = ["quantize", "in", "out", "--method", "gptq", "--bits", "3.2", "--option", "group-size=64", "-o", "damping = 0.02"]
    argv += ["--calibration", "c.txt", "--calibration", "d.txt"]
    argv += [ "--samples", "7", "--context", "33", "--mode", "sequential", "--device", "cpu", "--seed", "5", "--no-interleave"]
    assert run(*argv, "--resume", "--trust-remote-code", "--revision", "abc", "--json") == 0
    assert library.plan == ("gptq", 3.2, {"group_size": "64", "damping": "0.02"})
    args, kwargs = library.call
    assert args == ("in", "out", "the plan")
    assert kwargs == {
        "calibration": ["c.txt", "d.txt"], "samples": 7, "context": 33, "mode": "sequential", "hessian": "auto", "interleave": False,
        "device": "cpu", "seed": 5, "resume": True, "revision": "abc", "trust_remote_code": True, "block_tuning": None,
        "tuning": None, "teacher": None,
    }  # fmt: skip
    assert type(kwargs["mode"]) is str
    out, err = capsys.readouterr()
    assert json.loads(out) == REPORT
    assert "block 1/2  layers.0.q_proj  loss 0.0213  0.5 s  ETA" in err
    assert "warning: a [warning]" in err


def test_effort_is_a_tuning_and_options_that_yield_to_the_users(library):
    run("quantize", "in", "out", "--effort", "balanced")
    assert library.call[1]["tuning"] == EFFORTS["balanced"].tuning is not None
    assert library.checked == ["in"]
    run("quantize", "in", "out", "--effort", "balanced", "--teacher", "whole")
    assert library.call[1]["teacher"] == "whole" == library.checked[-1]
    run("quantize", "in", "out", "--effort", "best", "-o", "rounds=7")
    assert library.call[1]["tuning"] == EFFORTS["best"].tuning
    assert library.plan == ("vptq", None, {**EFFORTS["best"].options["vptq"], "rounds": "7"})


@pytest.mark.parametrize(
    ("given", "effort"),
    [([], "balanced"), (["--method", "gptq"], "fast"), (["--tune-blocks", "9"], "fast"), (["--effort", "fast"], "fast")],
)
def test_what_the_effort_is_where_none_is_given(given, effort, library):
    run("quantize", "in", "out", *given)
    assert library.call[1]["tuning"] == EFFORTS[effort].tuning
    assert library.checked == (["in"] if effort == "balanced" else [])


def test_steps_of_blocks_are_passed_on(library):
    run("quantize", "in", "out", "--tune-blocks", "7")
    assert library.call[1]["block_tuning"] == Tuning(steps=7) and library.call[1]["tuning"] is None


def test_a_plan_comes_from_a_file_or_from_an_allocation(library, capsys):
    run("quantize", "in", "out", "--plan", "p.json", "--hessian", "two-sided")
    assert library.call[0] == ("in", "out", "the plan in p.json") and library.call[1]["hessian"] == "two-sided"
    run("quantize", "in", "out", "--bits", "2.1", "--allocate", "--context", "33")
    assert library.call[0] == ("in", "out", "the allocation")
    assert library.planned[0] == ("in", "the plan") and library.planned[1]["context"] == 33
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


def test_an_effort_allocates_what_can_be_allocated_unless_told_otherwise(library):
    def plan(*argv: str, head: bool = True) -> object:
        library.head = head
        run("quantize", "in", "out", "--bits", "2.1", *argv)
        return library.call[0][2]

    library.wanted = Budget("vptq", 2.1)
    assert plan() == plan("--effort", "fast") == plan("--effort", "best") == "the allocation"
    assert plan("--effort", "fast", "--no-allocate") == plan("--effort", "fast", head=False) == library.wanted
    library.wanted = Budget("rtn", 4.1)
    assert plan("--method", "rtn") == library.wanted
    assert plan("--method", "rtn", "--allocate") == plan("--method", "rtn", "--effort", "balanced") == "the allocation"
