"""The bundled model from folder to text and numbers: quantize, load, write, measure, and the same bytes again."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import voroq
from voroq.cli import main
from voroq.evaluation.perplexity import evaluate
from voroq.integrations.transformers import quant_linears
from voroq.methods import VPTQ
from voroq.pipeline.plan import Plan
from voroq.pipeline.progress import Silent
from voroq.pipeline.run import quantize_model
from voroq.pipeline.text import DEMO_MODEL, bundled, cut_windows, tokenize

QUICK = VPTQ(vector_length=4, table_bits=6, kmeans_steps=3, rounds=0)
"""1.5 bits of codes per weight, tables excluded, with little training: quick, and good enough to tell right from wrong."""
CALIBRATION = {"calibration": "calibration-c4", "samples": 32, "context": 128, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """What the command line makes in a process of its own: the folder, and the report it prints."""
    out = tmp_path_factory.mktemp("demo") / "out"
    options = [word for field in fields(QUICK) for word in ("--option", f"{field.name}={getattr(QUICK, field.name)}")]
    settings = [word for key, value in CALIBRATION.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-c", "from voroq.cli import main; main()", "quantize", str(DEMO_MODEL), str(out), "--effort", "fast"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in the suite: sums over several may round differently
    done = subprocess.run([*command, *options, *settings, "--json"], env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_a_quantized_model_loads_writes_and_still_knows_its_language(made):
    out, report = made
    model, tokenizer = voroq.load(out, device="cpu", dtype=torch.float32)
    original, _ = voroq.load(DEMO_MODEL, device="cpu", dtype=torch.float32)
    assert len(quant_linears(model)) == len(report["sites"]) == 35
    prompt = tokenizer("The old man looked at the sea and", return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert written.shape == (1, prompt.shape[1] + 4)
    windows = cut_windows(tokenize(tokenizer, bundled("wikitext2-test").read_text(encoding="utf-8")), 128, "wikitext2")[:8]
    found = evaluate(model, windows, against=original)
    assert found.perplexity_against < 35  # 27 on these windows
    assert found.perplexity < 2 * found.perplexity_against
    assert found.top1 > 0.45
    assert found.kl < 0.7


def test_the_report_tells_what_the_files_hold(made, capsys):
    out, report = made
    assert report == json.loads((out / "voroq_report.json").read_text())
    assert report["options"] == {field.name: getattr(QUICK, field.name) for field in fields(QUICK)}
    assert 1.5 < report["bits_per_weight"] < 1.6
    assert all(0 < site["loss"] < 0.12 for site in report["sites"])
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(out), "--json"])
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    bits = [{site["name"]: site["bits_per_weight"] for site in source["sites"]} for source in (found, report)]
    assert bits[0] == pytest.approx(bits[1])
    assert {tensor["name"] for tensor in found["unquantized"]} == {entry["name"] for entry in report["unquantized"]}
    assert "1.5" in (out / "README.md").read_text()


class StopsAfterOne(Silent):
    """A listener that interrupts the run when its first block is on disk."""

    def block(self, i: int, name: str) -> None:
        if i == 1:
            raise KeyboardInterrupt


def test_the_same_settings_give_the_same_bytes(made, tmp_path):
    """From Python as from the command line; as far as the first block, which stands for the others."""
    out, again = made[0], tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        quantize_model(DEMO_MODEL, again, Plan(QUICK), **CALIBRATION, progress=StopsAfterOne())
    shards = sorted(path.name for path in again.glob("*.safetensors"))
    assert shards == ["model-00001-of-00006.safetensors", "model-00002-of-00006.safetensors"]
    assert all((again / name).read_bytes() == (out / name).read_bytes() for name in shards)
