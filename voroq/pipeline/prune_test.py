"""A pruned model is the original where the channels were worth nothing, nearest to it elsewhere, and a model like any other."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from voroq.cli import main
from voroq.errors import VoroqError
from voroq.numerics.linalg import without_columns
from voroq.pipeline import tune as pipeline_tune
from voroq.pipeline.model import OpenModel, open_model
from voroq.pipeline.prune import prune_model
from voroq.pipeline.source import open_source
from voroq.pipeline.tiny_models_test import tiny_tokens
from voroq.pipeline.tiny_runs_test import QUICK, content, quick_run, tiny_source
from voroq.pipeline.tune import check_memory
from voroq.tuning.loop import Tuning

TUNED = Tuning(steps=2, samples=6, batch=2, precision="float32")


def prune(source: Path, out: Path, channels: int | None = None, **changes: object) -> dict:
    return prune_model(source, out, channels=channels, calibration=source / "text.txt", samples=6, context=16, device="cpu", **changes)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tiny_tokens()).logits.detach()


def with_worthless_channels(source: Path, channels: list[int]) -> None:
    """Nobody reads the `channels` of the MLPs any more."""
    changed = tensors(source)
    for name, weight in changed.items():
        if name.endswith("down_proj.weight"):
            weight[:, channels] = 0
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3"])
def test_channels_that_nobody_reads_go_and_the_function_stays(tmp_path, name):
    source = tiny_source(tmp_path / "in", name)
    with_worthless_channels(source, [0, 5, 6, 20, 47])
    report = prune(source, tmp_path / "out", 43)
    assert (report["channels"], report["of"]) == (43, 48) and max(report["lost"]) < 1e-12
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=1e-4, atol=1e-5)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key].shape != after[key].shape}
    assert changed == {key for key in before if ".mlp." in key and key.endswith("_proj.weight")}
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - changed)
    weights = sum(t.numel() for key, t in after.items() if key.endswith("_proj.weight") and ".layers." in key)
    assert report["weights"] == weights


def test_the_others_answer_by_least_squares():
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 12, generator=rng).double(), torch.randn(5, 12, generator=rng).double()
    x[:, 3] += x[:, 7] + x[:, 1]
    gone = torch.tensor([7, 3])
    kept = [i for i in range(12) if i not in (3, 7)]
    best = torch.linalg.lstsq(x[:, kept], x @ w.T).solution.T
    torch.testing.assert_close(without_columns(w, x.T @ x / 200, gone), best)
    assert torch.equal(without_columns(w, torch.eye(12).double(), gone), w[:, kept])


def test_the_cheapest_go_and_the_same_again(tmp_path):
    source = tiny_source(tmp_path / "in")
    reports = [prune(source, tmp_path / str(n), n) for n in (47, 40, 24)]
    lost = [sum(report["lost"]) for report in reports]
    assert 0 < lost[0] < lost[1] < lost[2]
    down = "model.layers.0.mlp.down_proj.weight"
    old, new = tensors(source)[down], tensors(tmp_path / "40")[down]
    assert not (new[:, :, None] == old[:, None, :]).all(0).any()  # no column is as it was: all answer
    prune(source, tmp_path / "again", 40)
    assert content(tmp_path / "40") == content(tmp_path / "again")
    assert json.loads((tmp_path / "40" / "config.json").read_text())["intermediate_size"] == 40
    assert prune(source, tmp_path / "default")["channels"] == 45


def test_what_cannot_be_pruned_is_refused_and_nothing_is_written(tmp_path):
    for name, message in (("GPTNeoX", "0 MLPs of plain linears"), ("OPT", "0 MLPs"), ("Mixtral", "MLPs|of its own")):
        with pytest.raises(VoroqError, match=message):
            prune(tiny_source(tmp_path / name, name), tmp_path / "out", 40)
    source = tiny_source(tmp_path / "in")
    for channels in (0, 48, 100):
        with pytest.raises(VoroqError, match=f"{channels} of 48 channels cannot be kept: give 1 to 47"):
            prune(source, tmp_path / "out", channels)
    with pytest.raises(VoroqError, match="exceed the model's 64 positions"):
        prune_model(source, tmp_path / "out", context=65, device="cpu")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(VoroqError, match="exists; choose a new folder"):
        prune(source, tmp_path / "full", 40)


def test_a_width_that_the_config_does_not_say_is_refused(tmp_path, monkeypatch):
    source = tiny_source(tmp_path / "in", vocab_size=48)
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: {"vocab_size": 48, "hidden_size": 32})
    with pytest.raises(VoroqError, match=r"is the width \(48\) of its MLPs alone"):
        prune(source, tmp_path / "out", 40)
    assert not (tmp_path / "out").exists()


def test_a_pruned_model_is_tuned_towards_what_it_was(tmp_path):
    source = tiny_source(tmp_path / "in")
    prune(source, tmp_path / "pruned", 32)
    (tmp_path / "pruned" / "text.txt").write_text((source / "text.txt").read_text())
    made = {}
    for name, teacher in (("own", None), ("taught", source)):
        quick_run(tmp_path / "pruned", tmp_path / name, QUICK["vptq"], tuning=TUNED, teacher=teacher)
        made[name] = content(tmp_path / name)
    assert made["own"] != made["taught"]
    quick_run(source, tmp_path / "whole", QUICK["vptq"], tuning=TUNED)
    quick_run(source, tmp_path / "itself", QUICK["vptq"], tuning=TUNED, teacher=source)
    for file, mark in content(tmp_path / "whole").items():
        assert mark == content(tmp_path / "itself")[file]


def test_steps_bring_what_is_left_nearer_to_the_model(tmp_path):
    source = tiny_source(tmp_path / "in")
    more = {"calibration": source / "text.txt", "samples": 48, "context": 16, "device": "cpu", "channels": 24}
    prune_model(source, tmp_path / "plain", **more)
    report = prune_model(source, tmp_path / "tuned", steps=30, **more)
    assert report["tuning"]["steps"] == 30 and 0 < report["tuning"]["kl_after"] < report["tuning"]["kl_before"]
    plain, tuned = tensors(tmp_path / "plain"), tensors(tmp_path / "tuned")
    assert {name: (t.dtype, t.shape) for name, t in plain.items()} == {name: (t.dtype, t.shape) for name, t in tuned.items()}
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed == {name for name in plain if ".layers." in name or name == "model.norm.weight"}
    original = logits(source).log_softmax(-1)
    far = [(original.exp() * (original - logits(tmp_path / name).log_softmax(-1))).sum(-1).mean() for name in ("plain", "tuned")]
    assert far[1] < far[0]
    assert sorted(content(tmp_path / "plain")) == sorted(content(tmp_path / "tuned"))  # and nothing is left lying about
    prune_model(source, tmp_path / "again", steps=30, **more)
    assert content(tmp_path / "tuned") == content(tmp_path / "again")


def test_what_cannot_be_tuned_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    source = tiny_source(tmp_path / "in")
    monkeypatch.setattr(pipeline_tune, "free_memory", lambda device: 1000)
    with pytest.raises(VoroqError, match="GB of memory"):
        prune(source, tmp_path / "out", 40, steps=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(VoroqError, match="no language model head"):
        prune(source, tmp_path / "out", 40, steps=1)
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_kind_or_without_tuning_is_refused(tmp_path):
    source, other = tiny_source(tmp_path / "in"), tiny_source(tmp_path / "other", "Qwen3", hidden_size=64)
    with pytest.raises(VoroqError, match="nothing is tuned"):
        quick_run(source, tmp_path / "out", teacher=source)
    with pytest.raises(VoroqError, match=r"has hidden_size 64 and .* 32: give the model that it was made of"):
        quick_run(source, tmp_path / "out", tuning=TUNED, teacher=other)
    assert not (tmp_path / "out").exists()


def test_a_teacher_takes_the_place_of_what_the_student_was_made_of(tmp_path, monkeypatch):
    """Two models are in memory at a time, whoever teaches."""
    source, whole, made, alive = tiny_source(tmp_path / "in"), OpenModel.whole, [], []
    prune(source, tmp_path / "pruned", 40)
    (tmp_path / "pruned" / "text.txt").write_text((source / "text.txt").read_text())

    def recorded(self: OpenModel) -> torch.nn.Module:
        gc.collect()
        alive.append(sum(model() is not None for model in made))
        found = whole(self)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(OpenModel, "whole", recorded)
    quick_run(tmp_path / "pruned", tmp_path / "out", QUICK["vptq"], tuning=TUNED, teacher=source)
    assert alive == [0, 1, 1]


def test_a_larger_teacher_needs_more_room(tmp_path, monkeypatch):
    prune(tiny_source(tmp_path / "in"), tmp_path / "pruned", 40)
    model, teacher = (open_model(open_source(tmp_path / name), device="cpu") for name in ("pruned", "in"))
    monkeypatch.setattr(pipeline_tune, "free_memory", lambda device: pipeline_tune.tuning_bytes(model, model))
    check_memory(model)
    with pytest.raises(VoroqError, match="GB of memory"):
        check_memory(model, teacher)


def test_the_command_line_prunes(tmp_path, capsys):
    source = tiny_source(tmp_path / "in")
    words = ["--channels", "40", "--calibration", str(source / "text.txt"), "--context", "16", "--samples", "6", "--device", "cpu"]
    for extra in ([], ["--json"], ["--steps", "2"]):
        out = tmp_path / f"out{len(extra)}"
        with pytest.raises(SystemExit) as caught:
            main(["prune", str(source), str(out), *words, *extra])
        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert (json.loads(said)["channels"] == 40) if extra == ["--json"] else ("40 of 48 in every MLP" in said)
        assert ("2 steps: KL to" in said) == ("--steps" in extra)
