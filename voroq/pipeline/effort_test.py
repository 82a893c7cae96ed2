"""Presets are ordered, and never overrule what was asked for."""

from voroq.methods import METHODS
from voroq.pipeline.effort import EFFORTS
from voroq.pipeline.plan import make_plan


def test_more_effort_is_more_work():
    fast, balanced, best = EFFORTS.values()
    assert fast.tuning is None and not fast.options
    assert 0 < balanced.tuning.steps < best.tuning.steps
    assert best.options["vptq"]


def test_only_a_budget_is_allocated_and_only_where_the_effort_says_so():
    budget, given, grid = make_plan("vptq", 2.1, {}), make_plan("vptq", None, {"table_bits": "8"}), make_plan("gptq", 4.2, {})
    assert all(effort.allocates(budget) and not effort.allocates(given) for effort in EFFORTS.values())
    assert [effort.allocates(grid) for effort in EFFORTS.values()] == [False, True, True]


def test_what_was_asked_for_comes_first():
    best = EFFORTS["best"]
    assert best.completed("vptq", {"rounds": "5"})["rounds"] == "5"
    assert best.completed("rtn", {"bits": "3"}) == {"bits": "3"}


def test_options_of_every_preset_are_the_methods():
    for effort in EFFORTS.values():
        for method in METHODS:
            make_plan(method, None, effort.completed(method, {}))
