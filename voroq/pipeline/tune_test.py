"""Tuning a whole model: nothing for nothing, less divergence for something, the same bytes however often it is interrupted."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import voroq
from voroq.errors import VoroqError
from voroq.pipeline import tune as pipeline_tune
from voroq.pipeline.model import open_model
from voroq.pipeline.plan import Plan
from voroq.pipeline.progress import Silent
from voroq.pipeline.run import check_tuning_of
from voroq.pipeline.source import open_source
from voroq.pipeline.tiny_models_test import save_tiny
from voroq.pipeline.tiny_runs_test import QUICK, content, quick_run, tiny_source
from voroq.tuning import loop as module
from voroq.tuning.loop import Loop, Tuning
from voroq.tuning.losses import divergence

SOME = Tuning(steps=6, samples=6, batch=2, rate=0.004, norm_rate=0.001, precision="float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("in"))


def stored(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mixtral", "GPTNeoX"])
def test_the_whole_model_is_the_model(name, tmp_path):
    save_tiny(name, tmp_path)
    tokens = torch.arange(20).reshape(2, 10)
    ours = open_model(open_source(tmp_path), device="cpu").whole()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in ours.parameters())


def test_no_steps_change_no_byte(source, tmp_path):
    quick_run(source, tmp_path / "plain", QUICK["vptq"])
    report = quick_run(source, tmp_path / "tuned", QUICK["vptq"], tuning=Tuning(steps=0))
    assert content(tmp_path / "plain") == content(tmp_path / "tuned")
    assert report["tuning"] is None


@pytest.mark.parametrize("method", ["vptq", "gptq"])
def test_steps_lower_the_divergence_and_leave_the_codes(method, source, tmp_path):
    quick_run(source, tmp_path / "plain", QUICK[method])
    tuned = quick_run(source, tmp_path / "tuned", QUICK[method], tuning=replace(SOME, samples=24, steps=20))["tuning"]
    assert tuned["kl_after"] < tuned["kl_before"]
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "tuned")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(before[name].is_floating_point() for name in changed)
    assert any("norm" in name for name in changed) and any(name.endswith(("centroids.weight", "scales")) for name in changed), changed
    assert not any(before[name].dim() == 2 and "embed" in name for name in changed)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("rate", "matrix"), [("head_rate", "lm_head.weight"), ("embedding_rate", "model.embed_tokens.weight")])
def test_ends_are_tuned_where_they_are_matrices_of_their_own(rate, matrix, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(Loop, "adopt", lambda loop: None)  # whether it paid or not
    tiny_source(tmp_path / "in")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(tmp_path / "in")
    quick_run(tmp_path / "in", tmp_path / "plain", QUICK["vptq"])
    quick_run(tmp_path / "in", tmp_path / "tuned", QUICK["vptq"], tuning=replace(SOME, **{rate: 0.01}))
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed & {"lm_head.weight", "model.embed_tokens.weight"} == (set() if tied else {matrix})
    assert before["model.embed_tokens.weight"].dim() == 2


def moved_tensors(method, steps, moves, source, folder, monkeypatch):
    """All tensors before and after, a move at every step, whether it paid or not."""
    monkeypatch.setattr(module, "MOVE_EVERY", 1)
    monkeypatch.setattr(Loop, "adopt", lambda loop: None)
    quick_run(source, folder / "plain", QUICK[method])
    quick_run(source, folder / "tuned", QUICK[method], tuning=replace(SOME, steps=steps, moves=moves, move_rate=0.9))
    return stored(folder / "plain"), stored(folder / "tuned")


def test_scales_of_pyramids_are_tuned_and_their_numbers_move(source, tmp_path, monkeypatch):
    before, after = moved_tensors("pvq", 4, 0.05, source, tmp_path, monkeypatch)
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert {"weight_tables", "weight_scales", "weight_codes"} <= changed and "weight_signs_in" not in changed


def test_moves_change_codes_within_their_limit(source, tmp_path, monkeypatch):
    before, after = moved_tensors("vptq", 8, 0.01, source, tmp_path, monkeypatch)
    codes = [name for name in before if name.endswith("indices")]
    moved = sum(int((before[name] != after[name]).sum()) for name in codes)
    vectors = sum(8 * before[name].numel() for name in codes)  # 4 bits each in words of 32
    assert 0 < moved <= 8 * 0.01 * vectors


def test_the_folder_computes_what_the_report_says(source, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline_tune, "held_out", lambda count, seed: (torch.arange(2, count), torch.arange(2)))
    real = pipeline_tune.tune

    def watched(original, student, windows, *rest, **more):
        seen.append(windows)
        return real(original, student, windows, *rest, **more)

    monkeypatch.setattr("voroq.pipeline.finished.tune", watched)
    report = quick_run(source, tmp_path / "out", QUICK["vptq"], tuning=SOME)
    model, _ = voroq.load(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rows = seen[0][:2]
    with torch.no_grad():
        found = divergence(original(input_ids=rows).logits, model(input_ids=rows).logits)
    assert float(found) == pytest.approx(report["tuning"]["kl_after"], rel=0.02)


class Stops(Silent):
    """Interrupts at the `number`-th word of the tuning."""

    def __init__(self, number: int, word: str = "tuning, step") -> None:
        self.left, self.word = number, word

    def stage(self, name: str) -> None:
        self.left -= name.startswith(self.word)
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("tuning", [SOME, replace(SOME, moves=0.1, move_rate=0.9, guide=1.0)], ids=["tables", "codes"])
def test_an_interrupted_tuning_resumes_to_the_same_bytes(tuning, source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECK_EVERY", 2)
    monkeypatch.setattr(module, "MOVE_EVERY", 2)
    quick_run(source, tmp_path / "whole", QUICK["vptq"], tuning=tuning)
    expected = content(tmp_path / "whole")
    for number in (1, 3, 6):
        out = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            quick_run(source, out, QUICK["vptq"], tuning=tuning, progress=Stops(number))
        quick_run(source, out, QUICK["vptq"], tuning=tuning, resume=True)
        assert content(out) == expected, number


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_tuning_interrupted_between_two_files_resumes_to_the_same_bytes(mode, source, tmp_path, monkeypatch):
    """The renames of the last stage: each shard is staged, its hash written down, then put in its place."""
    quick_run(source, tmp_path / "whole", QUICK["rtn"], tuning=SOME, mode=mode)
    expected, rename = content(tmp_path / "whole"), os.replace
    untuned = [0]
    monkeypatch.setattr(os, "replace", lambda a, b: (untuned.__setitem__(0, untuned[0] + 1), rename(a, b))[1])
    quick_run(source, tmp_path / "plain", QUICK["rtn"], mode=mode)
    for extra in range(1, 12):
        left = [untuned[0] - 4 + extra]  # the last four of a plain run are index, config, report and what follows the shards

        def fails(a, b, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            rename(a, b)

        monkeypatch.setattr(os, "replace", fails)
        out = tmp_path / str(extra)
        with pytest.raises(KeyboardInterrupt):
            quick_run(source, out, QUICK["rtn"], tuning=SOME, mode=mode)
        monkeypatch.setattr(os, "replace", rename)
        quick_run(source, out, QUICK["rtn"], tuning=SOME, mode=mode, resume=True)
        assert content(out) == expected, extra


def test_every_option_changes_the_result(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOVE_EVERY", 1)
    monkeypatch.setattr(Loop, "adopt", lambda loop: None)
    made = {}
    changes = {"none": {}, "steps": {"steps": 3}, "batch": {"batch": 1}, "rate": {"rate": 0.002}, "norm_rate": {"norm_rate": 0.0}}
    changes |= {"samples": {"samples": 5}, "moves": {"moves": 0.1, "move_rate": 0.6}, "move_rate": {"moves": 0.1, "move_rate": 0.9}}
    changes |= {"guide": {"guide": 1.0}, "head_rate": {"head_rate": 0.01}, "embedding_rate": {"embedding_rate": 0.01}}
    changes |= {"weight_rate": {"weight_rate": 0.01}, "embedding_steps": {"embedding_rate": 0.01, "embedding_steps": 2}}
    plan = Plan(QUICK["vptq"], (("*.k_proj", None),))
    for name, change in changes.items():
        tuning = replace(SOME, **change)
        quick_run(source, tmp_path / name, plan, tuning=tuning)
        made[name] = str(content(tmp_path / name))
    quick_run(source, tmp_path / "half", plan, tuning=replace(SOME, precision="bfloat16"))
    made["precision"] = str(content(tmp_path / "half"))
    assert len(set(made.values())) == len(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"steps": -1}, "steps"), ({"samples": 1}, "samples"), ({"batch": 0}, "batch"), ({"rate": 2.0}, "rate")),
        *(({"norm_rate": -1.0}, "norm_rate"), ({"moves": 2.0}, "moves"), ({"move_rate": 2.0}, "move_rate"), ({"precision": "x"}, "preci")),
        *(({"guide": -1.0}, "guide"), ({"head_rate": 1.5}, "head_rate"), ({"embedding_rate": 1.5}, "embed")),
        *(({"weight_rate": 1.5}, "weight_rate"), ({"embedding_steps": 5}, "give an embedding_rate")),
        ({"embedding_steps": -1, "embedding_rate": 0.01}, "embedding_steps"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(VoroqError, match=message):
        Tuning(**options)


def test_a_model_without_a_head_cannot_be_tuned(tmp_path):
    source = tiny_source(tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(VoroqError, match="no language model head"):
        quick_run(source, tmp_path / "out", tuning=SOME)
    with pytest.raises(VoroqError, match="no language model head"):
        check_tuning_of(source, device="cpu")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_into_memory_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_tune, "free_memory", lambda device: 100_000)
    with pytest.raises(VoroqError, match=r"takes about .* GB of memory and 0.0 GB are free on cpu; .*--effort fast"):
        quick_run(source, tmp_path / "out", tuning=SOME)
    with pytest.raises(VoroqError, match="--effort fast"):
        check_tuning_of(source, device="cpu")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(pipeline_tune, "free_memory", lambda device: None)  # where the system does not say
    check_tuning_of(source, device="cpu")


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("name", ["vptq", "gptq"])
def test_tuned_blocks_answer_more_like_the_original_and_keep_their_codes(name, mode, source, tmp_path):
    tuning = replace(SOME, steps=20, samples=24, rate=0.002)
    quick_run(source, tmp_path / "plain", QUICK[name], mode=mode, samples=24)
    report = quick_run(source, tmp_path / "tuned", QUICK[name], mode=mode, samples=24, block_tuning=tuning)
    assert all(block["after"] <= block["before"] for block in report["block_tuning"])  # chosen by held-out windows
    assert any(block["after"] < block["before"] for block in report["block_tuning"])
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "tuned")
    if mode == "parallel":  # in sequential mode later blocks meet other inputs
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all(before[name].is_floating_point() and "norm" not in name for name in changed)


def test_a_block_with_no_steps_changes_no_byte_and_with_moves_its_codes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOVE_EVERY", 1)
    monkeypatch.setattr(Loop, "adopt", lambda loop: None)
    quick_run(source, tmp_path / "plain", QUICK["vptq"])
    quick_run(source, tmp_path / "none", QUICK["vptq"], block_tuning=Tuning(steps=0))
    quick_run(source, tmp_path / "moved", QUICK["vptq"], block_tuning=replace(SOME, moves=0.05, move_rate=0.9))
    plain, moved = stored(tmp_path / "plain"), stored(tmp_path / "moved")
    assert content(tmp_path / "plain") == content(tmp_path / "none")
    assert any(not torch.equal(plain[name], moved[name]) for name in plain if name.endswith("indices"))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_an_interrupted_run_of_tuned_blocks_resumes_to_the_same_bytes(mode, source, tmp_path):
    quick_run(source, tmp_path / "whole", QUICK["vptq"], mode=mode, block_tuning=SOME)

    class Stops(Silent):
        def stage(self, name: str) -> None:
            self.seen = getattr(self, "seen", 0) + (name == "tuning the block")
            if self.seen == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick_run(source, tmp_path / "out", QUICK["vptq"], mode=mode, block_tuning=SOME, progress=Stops())
    quick_run(source, tmp_path / "out", QUICK["vptq"], mode=mode, block_tuning=SOME, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_blocks_loss_is_what_the_report_says(source, tmp_path, monkeypatch):
    """With the held-out windows known, the error of a block is found again from the folder alone."""
    monkeypatch.setattr(pipeline_tune, "held_out", lambda count, seed: (torch.arange(2, count), torch.arange(2)))
    kept = []
    real = pipeline_tune.tune_block

    def watched(model, block, index, sites, inputs, *rest, **more):
        kept.append(inputs.read(0, 2))
        return real(model, block, index, sites, inputs, *rest, **more)

    monkeypatch.setattr("voroq.pipeline.run.tune_block", watched)
    report = quick_run(source, tmp_path / "out", QUICK["vptq"], block_tuning=SOME)
    model, _ = voroq.load(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for index, block in enumerate(report["block_tuning"]):
        with torch.no_grad():
            ours, theirs = (_block_output(m, index, kept[index]) for m in (model, original))
        assert float((ours - theirs).square().sum() / theirs.square().sum()) == pytest.approx(block["after"], rel=0.02)


def _block_output(model, index, hidden):
    angles = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    out = model.model.layers[index](hidden, attention_mask=mask, position_embeddings=angles)
    return out[0] if isinstance(out, tuple) else out
