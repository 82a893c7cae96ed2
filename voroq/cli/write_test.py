"""Text that the model writes itself: what it is, and that it calibrates."""

import json
from pathlib import Path

import pytest
import torch

from voroq.cli import main
from voroq.evaluation.models import open_model
from voroq.pipeline.calibration import calibration_windows
from voroq.pipeline.text import DEMO_MODEL


def written(path: Path, *extra: object) -> list[str]:
    """The texts in `path` after `voroq write`."""
    with pytest.raises(SystemExit) as caught:
        main(["write", str(DEMO_MODEL), str(path), *map(str, extra)])
    assert caught.value.code == 0
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_calibrates_and_is_the_same_for_the_same_seed(tmp_path, capsys):
    few = ("--documents", 5, "--tokens", 24, "--batch", 2)
    first = written(tmp_path / "first.jsonl", *few, "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["documents"], report["characters"]) == (5, sum(map(len, first)))
    assert len(first) == len(set(first)) == 5
    assert first == written(tmp_path / "again.jsonl", *few) != written(tmp_path / "other.jsonl", *few, "--seed", 1)
    assert len(set(written(tmp_path / "cold.jsonl", *few, "--temperature", 1e-4))) == 1
    _, tokenizer = open_model(DEMO_MODEL, device="cpu")
    assert all("<s>" not in text and 0 < len(tokenizer(text)["input_ids"]) <= 24 for text in first)
    assert calibration_windows(tokenizer, tmp_path / "first.jsonl", samples=2, context=8, seed=0).windows.shape == (2, 8)


def test_it_follows_the_odds_of_the_model(tmp_path):
    texts = written(tmp_path / "own.jsonl", "--documents", 512, "--tokens", 1)
    model, tokenizer = open_model(DEMO_MODEL, device="cpu")
    odds = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    for token in odds.topk(3).indices.tolist():
        expected = 512 * float(odds[token].detach())
        assert abs(texts.count(tokenizer.decode(token)) - expected) < 4 * expected**0.5


def test_it_begins_anywhere_where_asked_to(tmp_path):
    few = ("--documents", 400, "--tokens", 1, "--begin", "anywhere")
    _, tokenizer = open_model(DEMO_MODEL, device="cpu")
    firsts = [tokenizer(text)["input_ids"][0] for text in written(tmp_path / "own.jsonl", *few)]
    assert len(set(firsts)) > 200  # of 4096
    assert not set(firsts) & set(tokenizer.all_special_ids)
