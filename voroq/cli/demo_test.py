"""The demo end to end, with the fastest method in place of the best, and its care for what is in the way."""

import json

import pytest
from rich.console import Console

from voroq.cli import demo, main
from voroq.errors import VoroqError
from voroq.methods import RTN
from voroq.pipeline import plan


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *[str(word) for word in argv]])
    return caught.value.code


def test_the_demo_measures_both_models_and_lets_both_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "make_plan", lambda *args: RTN(bits=4))
    monkeypatch.setattr(demo, "SAMPLES", 2)
    monkeypatch.setattr(demo, "EFFORT", "fast")
    out = tmp_path / "demo"
    assert run("--out", out, "--windows", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "results.json").read_text())
    before, after = found["original"], found["quantized"]
    assert before["bits_per_weight"] == 16
    assert 4 < after["bits_per_weight"] < 4.5
    assert after["file_bytes"] < 0.6 * before["file_bytes"]
    assert set(before["perplexity"]) == set(after["perplexity"]) == set(demo.TEXTS)
    assert 0 < after["kl"] < 0.2
    assert 0.7 < after["top1"] < 1
    assert found["tokens"] == 2 * 2 * 255
    assert found["continuations"]["original"] != found["continuations"]["quantized"]
    card = (out / "model" / "README.md").read_text()
    assert "| wikitext2 | 256 | 510 |" in card


def test_people_get_one_table():
    quantized = {"bits_per_weight": 2.0987, "file_bytes": 8e6, "perplexity": {"wikitext2": 43.1, "c4": 98.2}}
    quantized |= {"kl": 0.0812, "top1": 0.8, "seconds": 40.0, "peak_memory": {"rss": 812e6, "cuda": None}}
    original = {"bits_per_weight": 16.0, "file_bytes": 22e6, "perplexity": {"wikitext2": 39.8, "c4": 93.1}}
    with (console := Console(width=100)).capture() as capture:
        console.print(demo.comparison_table({"original": original, "quantized": quantized, "context": 256}))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if line.startswith("│")]
    assert rows == [
        ["bits per weight of the original's linears, everything stored", "16.000", "2.099"],
        ["file size", "22.0 MB", "8.0 MB"],
        ["perplexity, wikitext2 (context 256)", "39.80", "43.10"],
        ["perplexity, c4 (context 256)", "93.10", "98.20"],
        ["KL divergence to the original (nats per token)", "0", "0.0812"],
        ["same best token as the original", "100 %", "80.0 %"],
        ["seconds to quantize", "-", "40.0"],
        ["peak memory while quantizing", "-", "812.0 MB"],
    ]


def test_what_others_wrote_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert run("--out", tmp_path / "mine") == 2
    assert "was not written by voroq demo" in capsys.readouterr().err
    assert run("--out", tmp_path / "mine" / "thesis.txt") == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_of_an_earlier_demo_only_its_own_files_go(tmp_path):
    folder = demo.prepare(tmp_path / "demo")
    (folder / "model").mkdir()
    (folder / "model" / "weights").touch()
    (folder / "results.json").touch()
    (folder / "notes.txt").touch()
    demo.prepare(folder)
    assert sorted(path.name for path in folder.iterdir()) == [demo.MARK, "notes.txt"]
    with pytest.raises(VoroqError):
        demo.prepare(tmp_path)
