"""What an effort does before its run: told from what reaches the run, and once from beginning to end, interrupted and resumed."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from voroq import prelude
from voroq.errors import VoroqError
from voroq.packed.files import sha256_of
from voroq.pipeline.effort import EFFORTS, Effort
from voroq.pipeline.output import JOURNAL, REPORT
from voroq.pipeline.plan import Budget, make_plan
from voroq.pipeline.progress import Silent
from voroq.pipeline.text import DEMO_MODEL
from voroq.prelude import quantize_with
from voroq.tuning.loop import Tuning

BUDGET = Budget("vptq", 2.1)
TEXT = {"calibration": "calibration-c4", "samples": 4, "context": 64, "device": "cpu"}
SHORT = Effort(Tuning(steps=1, batch=1, samples=8), own_text=3)


@pytest.fixture
def recorded(monkeypatch):
    """Everything that takes time replaced by a recorder."""
    seen = SimpleNamespace(head=True, channels=None, checked=[], planned=None, run=None)

    def plan_model(*args, **options):
        seen.planned = (args, options)
        return SimpleNamespace(plan="the allocation", channels=seen.channels)

    def quantize_model(*args, **options):
        seen.run = (args, options)
        return {}

    monkeypatch.setattr(prelude, "can_plan", lambda source, **place: seen.head)
    monkeypatch.setattr(prelude, "plan_model", plan_model)
    monkeypatch.setattr(prelude, "quantize_model", quantize_model)
    monkeypatch.setattr(prelude, "check_tuning_of", lambda source, **place: seen.checked.append(source))
    monkeypatch.setattr(prelude, "check_teacher_of", lambda source, teacher, tuning, **place: seen.checked.append(teacher))
    monkeypatch.setattr(prelude, "share_left", lambda source, channels, **place: seen.checked.append((source, channels)) or 0.875)
    monkeypatch.setattr(prelude.Beginning, "own_text", lambda self, count: Path(f"{count} documents"))
    monkeypatch.setattr(prelude.Beginning, "narrower", lambda self, channels, **text: Path(f"{self.source} with {channels} of {text}"))
    return seen


def test_an_effort_allocates_what_can_be_allocated_unless_told_otherwise(recorded, tmp_path):
    def plan(effort: str, wanted: Budget = BUDGET, *, head: bool = True, **options: object) -> object:
        recorded.head = head
        quantize_with(EFFORTS[effort], "in", tmp_path / "out", wanted, **options)
        return recorded.run[0][2]

    assert plan("fast") == plan("balanced") == plan("best") == "the allocation"
    assert plan("fast", allocate=False) == plan("fast", head=False) == BUDGET
    grid = Budget("rtn", 4.1)
    assert plan("fast", grid) == grid
    assert plan("fast", grid, allocate=True) == plan("balanced", grid) == "the allocation"
    assert recorded.checked == ["in"] * 3


def test_what_is_shared_reaches_plan_and_run(recorded, tmp_path):
    text = {"calibration": ["c.txt"], "samples": 7, "context": 33, "interleave": False}
    place = {"device": "cpu", "seed": 5, "revision": "abc", "trust_remote_code": True}
    before = time.perf_counter()
    quantize_with(EFFORTS["fast"], "in", tmp_path / "out", BUDGET, **text, **place, mode="sequential")
    progress = recorded.run[1]["progress"]
    assert before <= recorded.run[1].pop("began") <= time.perf_counter()
    expected = {**text, **place, "tuning": None, "teacher": None, "resume": False, "mode": "sequential", "progress": progress}
    assert recorded.run == (("in", tmp_path / "out", "the allocation"), expected)
    del text["samples"]  # a plan has its own number
    assert recorded.planned == (("in", BUDGET), {**text, **place, "narrower": False, "progress": progress})


def test_short_windows_are_more_where_the_effort_asks_for_tokens(recorded, tmp_path):
    def samples(effort: str, context: int | None, given: int | None = None) -> object:
        quantize_with(EFFORTS[effort], "in", tmp_path / "out", BUDGET, context=context, samples=given, own_text=0)
        return recorded.run[1]["samples"]

    assert [samples("best", context) for context in (256, 1024, 2048, None)] == [2048, 512, 512, None]
    assert samples("best", 256, 100) == 100 and samples("balanced", 256) is None


def test_text_of_its_own_stands_beside_the_text(recorded, tmp_path):
    def calibration(effort: str, **options: object) -> object:
        quantize_with(EFFORTS[effort], "in", tmp_path / "out", BUDGET, **options)
        assert recorded.planned[1]["calibration"] == recorded.run[1]["calibration"]
        return recorded.run[1]["calibration"]

    assert calibration("best") == [None, Path("4096 documents")]
    assert calibration("best", calibration=["a", "b"]) == ["a", "b", Path("4096 documents")]
    assert calibration("balanced") == [None, Path("512 documents")]
    assert calibration("best", own_text=0) is calibration("fast") is None
    assert calibration("fast", own_text=9, calibration="a") == ["a", Path("9 documents")]


def test_channels_are_left_out_where_the_plan_says_so_or_the_user(recorded, tmp_path):
    def run(effort: str, channels: int | None = None, **options: object) -> tuple[object, object, object]:
        quantize_with(EFFORTS[effort], "in", tmp_path / "out", BUDGET, channels=channels, own_text=0, **options)
        return recorded.run[0][0], recorded.run[1]["teacher"], recorded.planned[1]["narrower"]

    text = {"samples": None, "calibration": None, "context": None}
    assert run("best") == run("balanced") == ("in", None, True) and run("best", 0) == ("in", None, False)
    assert run("best", teacher="whole") == ("in", "whole", False)
    assert recorded.checked == ["in"] * 4 + ["whole"]
    recorded.channels = 960
    assert run("best") == (Path(f"in with 960 of {text}"), "in", True)
    recorded.channels = None
    assert run("balanced", 896) == (Path(f"in with 896 of {text}"), "in", False)
    assert recorded.checked[-2:] == ["in", ("in", 896)]
    assert recorded.planned[0] == (Path(f"in with 896 of {text}"), Budget("vptq", 2.1 / 0.875))


def test_what_can_be_refused_is_refused_before_anything_is_done(recorded, tmp_path):
    for effort, options in (("fast", {"channels": 9}), ("best", {"channels": 9, "teacher": "whole"})):
        with pytest.raises(VoroqError, match="voroq prune leaves them out"):
            quantize_with(EFFORTS[effort], "in", tmp_path / "out", BUDGET, **options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    recorded.checked.clear()
    with pytest.raises(VoroqError, match="is not a voroq run"):
        quantize_with(EFFORTS["best"], "in", tmp_path / "out", BUDGET)
    assert recorded.planned is recorded.run is None and recorded.checked == []


def test_channels_that_cannot_be_kept_are_refused_before_text_is_written(tmp_path):
    with pytest.raises(VoroqError, match="1024 of 1024 channels cannot be kept"):
        quantize_with(SHORT, DEMO_MODEL, tmp_path / "out", BUDGET, channels=1024, **TEXT)
    assert not (tmp_path / "out").exists()


class Stops(Silent):
    def block(self, index: int, name: str) -> None:
        if index == 2:
            raise KeyboardInterrupt


def test_from_beginning_to_end_and_resumed(tmp_path, monkeypatch):
    """An interrupted run finds text and narrower model again, and ends with the same bytes; both are gone with the journal."""
    plan = make_plan("vptq", 2.3, {"kmeans_steps": "2", "rounds": "0"})
    whole, parts, how = tmp_path / "whole", tmp_path / "parts", {**TEXT, "channels": 640, "hessian": "input"}
    report = quantize_with(SHORT, DEMO_MODEL, whole, plan, **how)
    with pytest.raises(KeyboardInterrupt):
        quantize_with(SHORT, DEMO_MODEL, parts, plan, **how, progress=Stops())
    made = sorted(path.name for path in (parts / JOURNAL).iterdir() if path.name.startswith(("own-text", "channels")))
    assert len(made) == 2, sorted((parts / JOURNAL).iterdir())
    documents = [json.loads(line) for line in (parts / JOURNAL / made[1]).read_text().splitlines()]
    assert len(documents) == 3 and all(document["text"] for document in documents)
    with monkeypatch.context() as patch:
        for name in ("documents", "prune_model"):
            patch.setattr(prelude, name, lambda *args, **options: pytest.fail("made again"))
        quantize_with(SHORT, DEMO_MODEL, parts, plan, **how, resume=True)
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert [sha256_of(whole / name) for name in files] == [sha256_of(parts / name) for name in files]
    assert not (parts / JOURNAL).exists()

    assert json.loads((whole / "config.json").read_text())["intermediate_size"] == 640
    assert report["source"] == str(DEMO_MODEL)
    assert report["share_of_weights"] == pytest.approx(1 - 5 * 3 * 384 * (1024 - 640) / 7864320)
    assert 2.15 < report["share_of_weights"] * report["bits_per_weight"] <= 2.3
    assert report["calibration"]["text"] == f"calibration-c4 + {made[1]}"
    stored = json.loads((whole / REPORT).read_text())
    card = (whole / "README.md").read_text()
    assert stored["share_of_weights"] == report["share_of_weights"]
    assert f"{100 * report['share_of_weights']:.1f} % of the original's" in card
    assert "demo-llama, quantized" in card


def test_seeds_and_numbers_make_texts_of_their_own(tmp_path):
    place = {"device": "cpu", "revision": None, "trust_remote_code": False}
    first, again, more, other = (
        prelude.Beginning(DEMO_MODEL, tmp_path / folder, seed, place, Silent()).own_text(count)
        for folder, seed, count in (("a", 0, 2), ("b", 0, 2), ("a", 0, 3), ("a", 1, 2))
    )
    assert first.name == again.name and first.read_text() == again.read_text()
    assert len({first.name, more.name, other.name}) == 3
    assert first.read_text() != other.read_text()


def test_a_tokenizer_without_a_beginning_begins_anywhere(tmp_path, monkeypatch):
    asked = []

    def documents(model, tokenizer, count, *, begin, **rest):
        asked.append((count, begin))
        yield ["x"] * count

    monkeypatch.setattr(prelude, "documents", documents)
    place = {"device": "cpu", "revision": None, "trust_remote_code": False}
    begun = prelude.Beginning(DEMO_MODEL, tmp_path, 0, place, Silent())
    begun.own_text(5)
    monkeypatch.setattr(prelude, "can_begin", lambda tokenizer: False)
    begun.own_text(4)
    assert asked == [(3, "bos"), (2, "anywhere"), (4, "anywhere")]
