import inspect

import voroq
from voroq import front  # before anything is patched: it wraps the run it finds
from voroq.pipeline import run


def test_the_front_door_takes_what_the_run_takes_and_leaves_a_card(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "quantize_model", lambda source, out, plan, **options: {"plan": plan, **options})
    carded = []
    monkeypatch.setattr(front, "write_card", carded.append)
    assert voroq.quantize_model("model", tmp_path, "plan", seed=3) == {"plan": "plan", "seed": 3}
    assert carded == [tmp_path]


def test_its_signature_is_the_runs():
    assert list(inspect.signature(voroq.quantize_model).parameters) == list(inspect.signature(run.quantize_model).parameters)
