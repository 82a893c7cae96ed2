"""Texts to measure on, with a tokenizer of one token per word."""

import pytest
import torch

from voroq.errors import VoroqError
from voroq.evaluation.texts import evaluation_text, evaluation_windows


def words(text: str, add_special_tokens: bool, verbose: bool) -> dict:
    assert not add_special_tokens
    return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(str(i) for i in range(20)))
    return path


def test_windows_come_from_the_start_without_overlap(numbers):
    assert torch.equal(evaluation_windows(words, numbers, context=6, windows=2), torch.arange(12).reshape(2, 6))
    assert evaluation_windows(words, str(numbers), context=6).shape == (3, 6)


def test_bundled_texts_have_a_short_and_a_full_name(tmp_path, monkeypatch):
    assert evaluation_text("c4") == evaluation_text("c4-heldout")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()  # a folder of that name is no text
    assert len(evaluation_text("books")) > 100_000


@pytest.mark.parametrize(
    ("context", "windows", "message"),
    [(1, None, "nothing to predict"), (6, 0, "nothing to measure"), (21, None, "holds 20 tokens"), (6, 4, "has 3 windows")],
)
def test_numbers_out_of_range_are_refused(numbers, context, windows, message):
    with pytest.raises(VoroqError, match=message):
        evaluation_windows(words, numbers, context=context, windows=windows)


def test_an_unknown_text_names_the_known_ones():
    with pytest.raises(VoroqError, match="wikitext2, books, c4"):
        evaluation_text("nowhere.txt")
