"""The embedding alone, towards what the first block answers: what a block answers, less error, only there, the same bytes after all."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from voroq.pipeline import embedding as module
from voroq.pipeline.embedding import answer, tune_embedding
from voroq.pipeline.progress import Silent
from voroq.pipeline.tiny_models_test import save_tiny
from voroq.pipeline.tiny_runs_test import QUICK, content, quick_run, tiny_source
from voroq.pipeline.tune_test import SOME, Stops, stored
from voroq.tuning import loop
from voroq.tuning.loop import Loop

ALONE = replace(SOME, steps=4, embedding_rate=0.002, embedding_steps=6)


def model_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


@pytest.mark.parametrize(("name", "block"), [("Llama", "model.layers.0"), ("GPTNeoX", "gpt_neox.layers.0")])
def test_the_answer_is_the_blocks_and_nothing_behind_it_runs(name, block, tmp_path):
    save_tiny(name, tmp_path)
    model, tokens = model_in(tmp_path), torch.arange(20).reshape(2, 10)
    expected = model(input_ids=tokens, output_hidden_states=True).hidden_states[1]
    hooks = len(model.get_submodule(block)._forward_hooks)  # the library has one of its own
    model.lm_head = model.embed_out = None  # would fail if it ran
    assert torch.equal(answer(model, block, tokens), expected)
    assert len(model.get_submodule(block)._forward_hooks) == hooks


def test_steps_lower_the_error_of_the_first_block_and_change_nothing_else(tmp_path):
    tiny_source(tmp_path)
    original, student = model_in(tmp_path), model_in(tmp_path)
    rng = torch.Generator().manual_seed(0)
    broken = student.model.layers[0].mlp.down_proj.weight
    broken += 0.3 * broken.std() * torch.randn(broken.shape, generator=rng)
    before = {name: p.clone() for name, p in student.named_parameters()}
    tokens = torch.randint(0, original.config.vocab_size, (96, 32), generator=rng)
    moment = torch.diag(torch.rand(original.config.hidden_size, generator=rng) + 0.1)

    def cost() -> float:
        error = answer(student, "model.layers.0", tokens) - answer(original, "model.layers.0", tokens)
        return float(((error @ moment) * error).sum(-1).mean())

    first = cost()
    tuning = replace(ALONE, embedding_steps=60)
    tune_embedding(original, student, tokens, "model.layers.0", moment, tuning, seed=0, state=None, progress=Silent())
    assert cost() < 0.8 * first
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"model.embed_tokens.weight"} and not any(p.requires_grad for p in student.parameters())


def test_a_tied_embedding_stands_still(tmp_path, monkeypatch):
    tuned = []
    monkeypatch.setattr("voroq.pipeline.tune.tune_embedding", lambda *given, **more: tuned.append(given))
    source = tiny_source(tmp_path / "in")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(source)
    quick_run(source, tmp_path / "out", QUICK["vptq"], tuning=ALONE)
    assert not tuned, "it is the head too"


def test_interrupted_there_or_later_it_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    monkeypatch.setattr(Loop, "adopt", lambda loop: None)
    source = tiny_source(tmp_path / "in")
    quick_run(source, tmp_path / "whole", QUICK["vptq"], tuning=ALONE)
    expected = content(tmp_path / "whole")
    for word, number in (("tuning the embedding", 1), ("tuning the embedding", 4), ("tuning, step", 3)):
        out = tmp_path / f"{word}{number}"
        with pytest.raises(KeyboardInterrupt):
            quick_run(source, out, QUICK["vptq"], tuning=ALONE, progress=Stops(number, word))
        quick_run(source, out, QUICK["vptq"], tuning=ALONE, resume=True)
        assert content(out) == expected, (word, number)


def test_the_embedding_is_what_its_steps_leave(tmp_path, monkeypatch):
    """Without further steps of its own it ends where the stage ends, not where it began."""
    monkeypatch.setattr(Loop, "adopt", lambda loop: None)
    source = tiny_source(tmp_path / "in")
    quick_run(source, tmp_path / "plain", QUICK["vptq"], tuning=replace(ALONE, embedding_rate=1e-12, embedding_steps=0))
    quick_run(source, tmp_path / "tuned", QUICK["vptq"], tuning=replace(ALONE, embedding_rate=1e-12))
    name = "model.embed_tokens.weight"
    before, after = (stored(tmp_path / folder)[name].float() for folder in ("plain", "tuned"))
    assert 0 < float((after - before).abs().max()) <= 6 * module.RATE * float(before.square().mean().sqrt()) * 3
