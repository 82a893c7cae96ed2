"""The quantized cache against transformers' own: the same tokens in the same places, the recent ones exact, memory that falls."""

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

import voroq
from voroq.codebook.presets import distortion
from voroq.codebook.rows import RowCode
from voroq.errors import VoroqError
from voroq.integrations.cache import PyramidCache, PyramidLayer
from voroq.integrations.compat import cache_argument
from voroq.integrations.conftest import SIZES, tiny

TOKENS = torch.arange(3, 43)[None]


def given(model, cache) -> dict:
    return cache_argument(model.prepare_inputs_for_generation, cache)


def states(tokens: int, *, batch: int = 2, heads: int = 3, size: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, tokens, size, generator=rng) for _ in range(2))


@pytest.mark.parametrize("recent", [0, 1, 4])
@pytest.mark.parametrize("steps", [[1] * 20, [7, 1, 1, 6, 5], [20]])
def test_old_tokens_are_decoded_and_recent_ones_exact(recent: int, steps: list[int]):
    """A literal twin: after every call the oldest but `recent` are coded once there are more than twice as many."""
    layer, (keys, values) = PyramidLayer(3.0, recent=recent, seed=5), states(20)
    code_k, code_v = RowCode(64, 3.0, 10), RowCode(64, 3.0, 11)
    twin_k, twin_v = code_k.decode(*code_k.encode(keys)), code_v.decode(*code_v.encode(values))
    coded = at = 0
    for step in steps:
        seen_k, seen_v = layer.update(keys[:, :, at : at + step], values[:, :, at : at + step])
        at += step
        assert layer.get_seq_length() == at and layer.get_mask_sizes(5) == (at + 5, 0)
        assert torch.equal(seen_k, torch.cat([twin_k[:, :, :coded], keys[:, :, coded:at]], dim=2))
        assert torch.equal(seen_v, torch.cat([twin_v[:, :, :coded], values[:, :, coded:at]], dim=2))
        if at - coded > 2 * recent:
            coded = at - recent
        assert layer.keys.shape[2] == at - coded <= 2 * recent
    error = ((twin_k - keys).square().sum() / keys.square().sum()).item()
    assert error == pytest.approx(distortion(16, 48), rel=0.05)


def test_memory_falls_to_the_bits_promised():
    layer = PyramidLayer(3.0, recent=0, seed=0)
    keys, values = (t.half() for t in states(100))
    layer.update(keys, values)
    assert layer.nbytes() == 2 * keys.numel() * RowCode(64, 3.0).stored_bits / 8
    assert layer.nbytes() / (2 * keys.numel() * 2) == pytest.approx(3.25 / 16)
    held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in (layer.keys, layer.values, *layer.coded)}
    assert sum(held.values()) == layer.nbytes()  # no view keeps the exact tokens alive


def test_batches_are_chosen_reordered_repeated_and_cut():
    keys, values = states(12)
    order = torch.tensor([1, 0])

    def filled() -> PyramidLayer:
        layer = PyramidLayer(4.0, recent=2, seed=0)
        layer.update(keys, values)
        return layer

    before = torch.cat([filled().decoded()[0], filled().keys], dim=2)
    for change, expected in [
        (lambda layer: layer.reorder_cache(order), before[order]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), before[1:]),
        (lambda layer: layer.batch_repeat_interleave(2), before.repeat_interleave(2, 0)),
        (lambda layer: layer.crop(-1), before[:, :, :11]),
        (lambda layer: layer.crop(-5), before[:, :, :7]),
        (lambda layer: layer.crop(7), before[:, :, :7]),
        (lambda layer: layer.offload(), before),
    ]:
        layer = filled()
        change(layer)
        assert layer.get_seq_length() == expected.shape[2]
        more = states(1, batch=expected.shape[0])[0]
        assert torch.equal(layer.update(more, more)[0], torch.cat([expected, more], dim=2))
    layer = filled()
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes() == 0
    assert torch.equal(layer.update(keys, values)[0], keys)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3-moe"])
def test_generate_runs_and_a_wide_window_changes_nothing(kind: str):
    model = tiny(kind)
    plain = model.generate(TOKENS, max_new_tokens=12, do_sample=False)
    cache = voroq.PyramidCache(model.config, bits=4.0, recent=100)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=12, do_sample=False, **given(model, cache)), plain)
    small = PyramidCache(model.config, bits=4.0, recent=4)
    out = model.generate(TOKENS, max_new_tokens=12, do_sample=False, **given(model, small))
    assert out.shape[0] == 1 and TOKENS.shape[1] < out.shape[1] <= 52 and small.get_seq_length() == out.shape[1] - 1
    exact = DynamicCache(config=model.config)
    model.generate(TOKENS, max_new_tokens=12, do_sample=False, **given(model, exact))
    assert small.nbytes() < 0.4 * sum(t.numel() * t.element_size() for layer in exact.layers for t in (layer.keys, layer.values))
    beams = PyramidCache(model.config, bits=4.0, recent=4)
    assert model.generate(TOKENS, max_new_tokens=6, num_beams=3, do_sample=False, **given(model, beams)).shape[0] == 1


@torch.no_grad()
def test_logits_come_nearer_with_the_bits():
    model, past, now = tiny("llama"), TOKENS[:, :36], TOKENS[:, 36:]
    exact = model(TOKENS).logits[:, 36:]
    found = []
    for bits in (2.0, 3.0, 4.0, 6.0):
        cache = PyramidCache(model.config, bits=bits, recent=0)
        model(past, **given(model, cache))
        found.append(float((model(now, **given(model, cache)).logits - exact).square().mean()))
    assert found == sorted(found, reverse=True) and 0 < found[-1] < found[0] / 20


def test_sliding_layers_stay_and_the_others_are_coded():
    types = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "head_dim": 8, "sliding_window": 8, "layer_types": types}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    cache = PyramidCache(model.config, recent=0)
    assert [isinstance(layer, PyramidLayer) for layer in cache.layers] == [False, True]
    assert model.generate(TOKENS, max_new_tokens=4, do_sample=False, **given(model, cache)).shape[1] <= 44 and cache.nbytes() > 0


def test_what_makes_no_sense_is_refused():
    config = tiny("llama").config
    with pytest.raises(VoroqError, match="recent=-1 is out of range"):
        PyramidCache(config, recent=-1)
    with pytest.raises(VoroqError, match="7 bits are out of range for rows of 8 numbers; give 1 to 6"):
        PyramidCache(config, bits=7.0)
    windowed = Gemma2Config(**{**SIZES, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2})
    with pytest.raises(VoroqError, match="no layer of full attention"):
        PyramidCache(windowed)
