"""Calibration windows: seeded, whole, and never from an evaluation text."""

import sys
from types import SimpleNamespace

import pytest
import torch

from voroq.errors import VoroqError
from voroq.pipeline.calibration import Calibration, calibration_windows
from voroq.pipeline.progress import Progress, Silent
from voroq.pipeline.text import EVALUATION_TEXTS, bundled


def words(text: str, add_special_tokens: bool, verbose: bool) -> dict:
    """A tokenizer: the short numbers in the text are the tokens, any other word is token 1."""
    assert not add_special_tokens
    return {"input_ids": [int(word) if word.isdecimal() and len(word) < 9 else 1 for word in text.split()]}


class Ears(Silent):
    def __init__(self):
        self.heard = []

    def warn(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(str(i) for i in range(100)))
    return path


def choose(source, samples: int = 4, context: int = 5, seed: int = 0, **kwargs) -> Calibration:
    return calibration_windows(words, source, samples=samples, context=context, seed=seed, **kwargs)


def test_windows_are_different_whole_windows_of_the_text(numbers):
    windows, _ = choose(numbers)
    assert windows.shape == (4, 5)
    starts = windows[:, 0]
    assert torch.equal(windows, starts[:, None] + torch.arange(5))
    assert (starts % 5 == 0).all()
    assert len(set(starts.tolist())) == 4


def test_the_seed_alone_decides(numbers):
    torch.manual_seed(1)
    first = choose(numbers)
    state = torch.random.get_rng_state()
    again = choose(numbers)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.windows, again.windows)
    assert first.fingerprint == again.fingerprint
    other = choose(numbers, seed=1)
    assert not torch.equal(first.windows, other.windows)
    assert first.fingerprint != other.fingerprint


def test_the_fingerprint_tells_the_windows_shape_apart(numbers):
    assert choose(numbers, samples=20, context=5).fingerprint != choose(numbers, samples=10, context=10).fingerprint


def test_a_short_text_gives_all_it_has_and_says_so(numbers):
    ears = Ears()
    windows, _ = choose(numbers, samples=50, progress=ears)
    assert torch.equal(windows[windows[:, 0].argsort()], torch.arange(100).reshape(20, 5))
    assert ears.heard == [f"{numbers.name} has 20 windows of 5 tokens, not 50: calibrating on all of them"]
    ears = Ears()
    choose(numbers, samples=20, progress=ears)
    assert ears.heard == []


def test_windows_of_several_texts_are_drawn_from_all_together(numbers, tmp_path):
    second = tmp_path / "second.txt"
    second.write_text(" ".join(str(i) for i in range(1000, 1100)))
    both = choose([numbers, second], samples=40).windows
    assert both.shape == (40, 5) and sorted(both[:, 0].tolist()) == [*range(0, 100, 5), *range(1000, 1100, 5)]
    for windows in (both, choose([numbers, second], samples=20).windows):
        for half in windows.chunk(2):  # gradients are taken on the first
            assert (half < 100).any() and (half >= 1000).any()
    assert torch.equal(choose([numbers]).windows, choose(numbers).windows)
    ears = Ears()
    choose([numbers, second], samples=41, progress=ears)
    assert f"{numbers.name} + {second.name} has 40 windows" in ears.heard[0]
    with pytest.raises(VoroqError, match="evaluation text"):
        choose([numbers, "c4"])
    with pytest.raises(VoroqError, match="at least one"):
        choose([])


def test_the_default_is_the_bundled_mixed_text():
    assert torch.equal(choose(None).windows, choose("calibration-mixed").windows)


def test_a_text_without_one_window_is_refused(numbers, tmp_path):
    with pytest.raises(VoroqError, match="holds 100 tokens, shorter than one window of 101"):
        choose(numbers, context=101)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(VoroqError, match="is empty"):
        choose(tmp_path / "empty.txt")


@pytest.mark.parametrize("name", [*EVALUATION_TEXTS, *EVALUATION_TEXTS.values()])
def test_an_evaluation_text_is_refused_by_name(name):
    with pytest.raises(VoroqError, match="evaluation text"):
        choose(name)


@pytest.mark.parametrize("name", EVALUATION_TEXTS)
def test_an_evaluation_text_is_refused_by_content(tmp_path, name):
    path = tmp_path / "innocent.txt"
    path.write_text("\n" + bundled(EVALUATION_TEXTS[name]).read_text(encoding="utf-8").rstrip())
    with pytest.raises(VoroqError, match=f"innocent.txt is the evaluation text {name}"):
        choose(path)


def test_numbers_out_of_range_and_unknown_sources_are_refused(numbers):
    with pytest.raises(VoroqError, match="0 windows of 5"):
        choose(numbers, samples=0)
    with pytest.raises(VoroqError, match="windows of 0"):
        choose(numbers, context=0)
    with pytest.raises(VoroqError, match=r"no calibration text nowhere\.txt"):
        choose("nowhere.txt")


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(VoroqError, match="pip install datasets"):
        choose("dataset:some/name")


def test_a_dataset_is_read_as_a_stream_until_there_is_enough(monkeypatch):
    asked = []

    def rows():
        for i in range(1000):
            assert i < 10, "read far more than 4 windows of 5 tokens need"
            yield {"text": " ".join(str(j % 50) for j in range(i, i + 100))}

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert choose("dataset:some/name:config:test").windows.shape == (4, 5)
    assert asked == [(("some/name", "config"), {"split": "test", "streaming": True})]
    choose("dataset:some/name")
    assert asked[1] == (("some/name", None), {"split": "train", "streaming": True})


def test_a_dataset_that_fails_or_has_no_text_is_one_line(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("first\nsecond")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails))
    with pytest.raises(VoroqError, match=r"cannot be read \(RuntimeError: first second\)"):
        choose("dataset:x")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: [{"body": "x"}]))
    with pytest.raises(VoroqError, match="gave no text"):
        choose("dataset:x")


def test_silence_is_a_listener():
    assert isinstance(Silent(), Progress)
