"""Perplexity and KL against a literal twin, and against the anchors of the bundled model."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from voroq.errors import VoroqError
from voroq.evaluation import perplexity
from voroq.evaluation.perplexity import evaluate, pooled
from voroq.evaluation.texts import evaluation_windows
from voroq.pipeline.text import DEMO_MODEL


def tiny(seed: int, vocabulary: int = 37) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():  # the default start is so flat that every model agrees with every other
            p.data += 0.3 * torch.randn(p.shape)
    return model


def windows(count: int, context: int, vocabulary: int = 37) -> torch.Tensor:
    return torch.randint(vocabulary, (count, context), generator=torch.Generator().manual_seed(5))


def literal(model: nn.Module, original: nn.Module, tokens: torch.Tensor) -> tuple[float, float, float]:
    """One position and one token of the vocabulary at a time, in Python floats."""
    loss = kl = same = count = 0
    for row in tokens:
        for i in range(1, len(row)):
            with torch.no_grad():
                q = torch.tensor(model(input_ids=row[None, :i]).logits[0, -1].tolist(), dtype=torch.float64)
                p = torch.tensor(original(input_ids=row[None, :i]).logits[0, -1].tolist(), dtype=torch.float64)
            q_sum = sum(math.exp(v) for v in q)
            p_sum = sum(math.exp(v) for v in p)
            loss -= math.log(math.exp(q[row[i]]) / q_sum)
            for v in range(len(q)):
                kl += math.exp(p[v]) / p_sum * math.log((math.exp(p[v]) / p_sum) / (math.exp(q[v]) / q_sum))
            same += max(range(len(q)), key=lambda v: q[v]) == max(range(len(p)), key=lambda v: p[v])
            count += 1
    return math.exp(loss / count), kl / count, same / count


def test_perplexity_kl_and_agreement_equal_the_literal_twin():
    model, original, tokens = tiny(1), tiny(2), windows(3, 7)
    result = evaluate(model, tokens, against=original)
    ppl, kl, top1 = literal(model, original, tokens)
    assert result.perplexity == pytest.approx(ppl, rel=1e-5)
    assert result.perplexity_against == pytest.approx(literal(original, model, tokens)[0], rel=1e-5)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.top1 == pytest.approx(top1)
    assert 0 < top1 < 1
    assert (result.tokens, result.context) == (18, 7)


def test_batches_and_chunks_do_not_change_the_result(monkeypatch):
    model, original, tokens = tiny(1), tiny(2), windows(5, 9)
    whole = evaluate(model, tokens, against=original)
    monkeypatch.setattr(perplexity, "SOFTMAX_AT_ONCE", 37 * 5)
    parts = evaluate(model, tokens, against=original, batch=2)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.top1 == whole.top1


def test_a_model_is_at_no_distance_from_itself():
    model = tiny(1)
    result = evaluate(model, windows(2, 8), against=model)
    assert result.kl == 0.0
    assert result.top1 == 1.0


def test_without_an_original_there_is_no_kl():
    result = evaluate(tiny(1), windows(2, 8))
    assert (result.kl, result.top1, result.perplexity_against) == (None, None, None)


def test_pooled_evaluations_equal_one_evaluation_of_all_windows():
    model, original, tokens = tiny(1), tiny(2), windows(5, 9)
    whole = evaluate(model, tokens, against=original)
    both = pooled([evaluate(model, tokens[:2], against=original), evaluate(model, tokens[2:], against=original)])
    assert both.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert both.kl == pytest.approx(whole.kl, rel=1e-6)
    assert both.perplexity_against == pytest.approx(whole.perplexity_against, rel=1e-6)
    assert (both.top1, both.tokens) == (pytest.approx(whole.top1), whole.tokens)


def test_the_training_mode_of_a_model_is_given_back():
    model = tiny(1).train()
    evaluate(model, windows(1, 4))
    assert model.training


def test_ticks_count_every_window():
    seen = []
    evaluate(tiny(1), windows(5, 4), batch=2, tick=seen.append)
    assert seen == [2, 2, 1]


def test_bad_input_is_refused():
    with pytest.raises(VoroqError, match="nothing to predict"):
        evaluate(tiny(1), windows(2, 1))
    with pytest.raises(VoroqError, match="vocabulary of 37"):
        evaluate(tiny(1), windows(2, 8) + 30)
    with pytest.raises(VoroqError, match="vocabularies of 37 and 41"):
        evaluate(tiny(1), windows(2, 8), against=tiny(2, vocabulary=41))
    damaged = tiny(1)
    damaged.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(VoroqError, match="not finite"):
        evaluate(damaged, windows(2, 8))


def test_a_token_the_original_excludes_adds_nothing_to_kl():
    class Fixed(nn.Module):
        def __init__(self, row: list[float]):
            super().__init__()
            self.row, self.device = torch.tensor(row), torch.device("cpu")

        def get_input_embeddings(self):
            return nn.Embedding(3, 1)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.row.expand(*input_ids.shape, 3))

    result = evaluate(Fixed([0.0, 0.0, -torch.inf]), torch.zeros(1, 3, dtype=torch.int64), against=Fixed([0.0, 0.0, -torch.inf]))
    assert result.kl == 0.0


@pytest.fixture(scope="module")
def demo():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL)


# The anchor was measured independently of this library (100 windows); the 10-window numbers are ours.
@pytest.mark.parametrize(("text", "count", "expected"), [("wikitext2", 10, 31.0326), ("books", 10, 41.0294), ("c4", 100, 93.0934)])
def test_the_bundled_model_reproduces_its_full_precision_perplexity(demo, text, count, expected):
    model, tokenizer = demo
    result = evaluate(model, evaluation_windows(tokenizer, text, context=256, windows=count))
    assert result.perplexity == pytest.approx(expected, abs=1e-4)
    assert result.tokens == count * 255
