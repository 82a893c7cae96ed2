"""Reading texts and cutting them, with a tokenizer of one token per word."""

import json

import pytest
import torch

from voroq.errors import VoroqError
from voroq.pipeline.text import CALIBRATION_TEXTS, EVALUATION_TEXTS, bundled, cut_windows, default_context, read_text


def test_every_bundled_text_is_there():
    for name in [*CALIBRATION_TEXTS, *EVALUATION_TEXTS.values()]:
        assert bundled(name).stat().st_size > 100_000


def test_rows_of_json_and_lines_of_jsonl_give_the_same_text(tmp_path):
    rows = [{"text": "one", "other": 1}, {"text": "two ü"}, "three"]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "a.txt").write_text("one\n\ntwo ü\n\nthree", encoding="utf-8")
    texts = {read_text(tmp_path / f"a.{kind}") for kind in ["json", "jsonl", "txt"]}
    assert texts == {"one\n\ntwo ü\n\nthree"}


def test_one_json_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "whole"}')
    assert read_text(tmp_path / "a.json") == "whole"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.json", b"", "is empty"),
        ("a.txt", b"ok \xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.json", b"[1, 2", "is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "row 1 has no text"),
        ("a.json", b'["x", 3]', "row 2 has no text"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VoroqError, match=message) as caught:
        read_text(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in [tmp_path / "none.txt", tmp_path]:
        with pytest.raises(VoroqError, match="no text at"):
            read_text(path)


def test_windows_are_consecutive_and_the_remainder_is_left_out():
    windows = cut_windows(torch.arange(11), 3, "x")
    assert windows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(VoroqError, match="x holds 11 tokens, shorter than one window of 12"):
        cut_windows(torch.arange(11), 12, "x")


def test_the_default_context_is_the_models_up_to_2048():
    assert [default_context(n) for n in [256, 131072, None]] == [256, 2048, 2048]
