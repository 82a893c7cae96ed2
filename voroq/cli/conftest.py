"""The library behind the command line, replaced by a recorder."""

import sys
from types import SimpleNamespace

import pytest

import voroq.pipeline.effort  # noqa: F401 - whose own imports must be of the real modules

REPORT = {"source": "in", "bits_per_weight": 2.05, "seconds": 75.0, "peak_memory": {"rss": 10**9, "cuda": None},
          "tuning": {"kl_before": 0.09, "kl_after": 0.05}}  # fmt: skip


@pytest.fixture
def library(monkeypatch):
    """The pipeline replaced by a recorder; `fails` is raised by it if set."""
    seen = SimpleNamespace(plan=None, call=None, fails=None)

    def make_plan(*args):
        seen.plan = args
        return "the plan"

    def quantize_with(*args, progress, **kwargs):
        seen.call = (args, kwargs)
        progress.start(2, 4)
        progress.block(0, "layers.0")
        progress.stage("observing")
        progress.site("layers.0.q_proj", 0.5, 0.0213)
        progress.warn("a [warning]")
        if seen.fails is not None:
            raise seen.fails
        progress.done()
        return REPORT

    def plan_model(*args, progress, **kwargs):
        seen.planned = (args, kwargs)
        return SimpleNamespace(plan="the allocation")

    monkeypatch.setitem(sys.modules, "voroq.pipeline.plan", SimpleNamespace(make_plan=make_plan))
    planning = SimpleNamespace(plan_model=plan_model, read_plan=lambda path: f"the plan in {path}")
    monkeypatch.setitem(sys.modules, "voroq.pipeline.planning", planning)
    monkeypatch.setitem(sys.modules, "voroq.prelude", SimpleNamespace(quantize_with=quantize_with))
    return seen
