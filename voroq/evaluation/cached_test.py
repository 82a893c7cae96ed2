"""Evaluation through the quantized cache: exact where nothing is coded, and what a single call computes where something is."""

import pytest
import torch

from voroq.errors import VoroqError
from voroq.evaluation.cached import Cached
from voroq.evaluation.perplexity import evaluate
from voroq.integrations.cache import PyramidCache
from voroq.integrations.compat import cache_argument
from voroq.integrations.conftest import tiny

ROWS = torch.randint(3, 64, (3, 21), generator=torch.Generator().manual_seed(0))


def test_with_everything_recent_chunks_are_the_plain_way():
    model = tiny("llama")
    for chunk in (1, 5, 16, 21, 40):
        assert torch.allclose(Cached(4.0, recent=21, chunk=chunk)(model, ROWS), model(ROWS).logits, atol=1e-5)


@torch.no_grad()
def test_a_chunk_sees_what_came_before_it_through_codes():
    model, cache = tiny("llama"), PyramidCache(tiny("llama").config, 3.0, recent=0)
    found = Cached(3.0, recent=0, chunk=8)(model, ROWS)
    exact = model(ROWS).logits
    assert torch.allclose(found[:, :8], exact[:, :8], atol=1e-5) and not torch.allclose(found[:, 8:], exact[:, 8:], atol=1e-3)
    model(ROWS[:, :8], **cache_argument(model.forward, cache))
    assert torch.allclose(model(ROWS[:, 8:16], **cache_argument(model.forward, cache)).logits, found[:, 8:16], atol=1e-5)


def test_more_bits_are_nearer_to_the_original():
    model = tiny("llama")
    found = [evaluate(model, ROWS, against=model, through=Cached(bits, recent=0, chunk=4)).kl for bits in (2.0, 4.0, 6.0)]
    assert found == sorted(found, reverse=True) and found[0] > 10 * found[2] > 0
    assert evaluate(model, ROWS, against=model).kl == pytest.approx(0.0, abs=1e-7)


def test_chunks_of_nothing_are_refused():
    with pytest.raises(VoroqError, match="chunks of 0 tokens get nowhere"):
        Cached(4.0, chunk=0)
