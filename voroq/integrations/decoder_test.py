"""A step in the library against the model's own, for whatever models and linears have its parts; and what must not go through it."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from voroq import native
from voroq.codebook.pyramid import Pulses
from voroq.integrations.cache import PyramidCache
from voroq.integrations.compat import cache_argument
from voroq.integrations.decoder import Decoder, Unfit, speed_up
from voroq.integrations.room import RoomyLayer
from voroq.kernels import cpu
from voroq.layer import QuantLinear
from voroq.packed.conftest import random_band, random_gptq, random_pyramids, random_transform, random_vptq
from voroq.packed.format import pack
from voroq.quantized import Quantized, Tile

SIZES = {
    **{"vocab_size": 64, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "max_position_embeddings": 512},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1},
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, tied, biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama3 rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEARS = {
    "dense": lambda out, columns, seed: None,
    "vptq": lambda out, columns, seed: random_vptq(out, columns, seed, v=4, sizes=(16, 4), steps=("affine", "permute")),
    "gptq": lambda out, columns, seed: random_gptq(out, columns, seed),
    "pyramids, inputs turned": lambda out, columns, seed: pyramids(out, columns, seed, "rotate_in"),
    "pyramids, both turned": lambda out, columns, seed: pyramids(out, columns, seed, "rotate_both"),
    "pulses along the input": lambda out, columns, seed: pulses(out, columns, seed),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-2, torch.bfloat16: 0.2}
"""Of the logits. The models here magnify what is rounded; both ways are as far from float32."""


pytestmark = pytest.mark.skipif(native.library() is None, reason="no library of CPU kernels")


def pyramids(out: int, columns: int, seed: int, *steps: str) -> Quantized:
    rng = torch.Generator().manual_seed(seed)
    band, codes = random_band(0, columns, Tile(8, 1), random_pyramids(8, (4, 3, 1), 0, rng), out, rng, scale=True)
    return Quantized((out, columns), random_transform(columns, steps, rng, out), (band,), (codes,))


def pulses(out: int, columns: int, seed: int) -> Quantized:
    rng = torch.Generator().manual_seed(seed)
    band, codes = random_band(0, columns, Tile(1, 8), Pulses(8, (4, 9), torch.tensor([0.05, 0.03])), out, rng)
    return Quantized((out, columns), random_transform(columns, ("rotate_in",), rng, out), (band,), (codes,))


def made(kind: str, linear: str = "dense", dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().to(dtype).eval()
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3 if parameter.dim() == 1 else 2 * parameter.shape[-1] ** -0.5)
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in path]
    for i, (path, module) in enumerate(linears):
        own = list(LINEARS)[i % len(LINEARS)] if linear == "of all kinds" else linear
        if own != "dense":
            packed = pack(LINEARS[own](*module.weight.shape, i), torch.float32, "vptq" if own == "vptq" else "voroq")
            model.set_submodule(path, QuantLinear.holding(packed, module.bias))
    return model


def tokens(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (batch, count), generator=torch.Generator().manual_seed(1))


def given(model: nn.Module, cache: DynamicCache) -> dict:
    return cache_argument(model.forward, cache)


@torch.inference_mode()
def said(model: nn.Module, x: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of all tokens behind the prompt, which go in one by one."""
    cache, found = DynamicCache(config=model.config), []
    model(x[:, :prompt], use_cache=True, **given(model, cache))
    for t in range(prompt, x.shape[1]):
        found.append(model(x[:, t : t + 1], use_cache=True, **given(model, cache)).logits[:, -1])
    return torch.stack(found).float()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that go through the library."""
    seen, real = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, token, cache: (seen.append(token), real(self, token, cache))[1])
    return seen


PAIRS = [*((kind, "dense") for kind in MODELS), *(("llama", linear) for linear in LINEARS if linear != "dense")]
PAIRS += [("qwen2", "vptq"), ("llama", "of all kinds"), ("llama, tied, biased", "of all kinds")]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kind", "linear"), PAIRS)
def test_steps_say_what_the_model_says(kind: str, linear: str, dtype: torch.dtype, steps: list[int]):
    model, x = made(kind, linear, dtype), tokens(12)
    before = said(model, x, 3)
    assert speed_up(model) is None
    steps.clear()
    assert far(said(model, x, 3), before) < TOLERANCE[dtype]
    assert steps == x[0, 3:].tolist()


def test_long_pasts_grow_their_buffers(steps: list[int]):
    model, x = made("llama"), tokens(400)
    before = said(model, x, 200)
    assert speed_up(model) is None
    assert far(said(model, x, 200), before) < 1e-5


@pytest.mark.parametrize("isa", range(len(native.isas())))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_instruction_set_and_number_of_threads(isa: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    model, x, threads = made("llama", "vptq", dtype), tokens(40), torch.get_num_threads()
    before = said(model, x, 3)
    assert speed_up(model) is None
    monkeypatch.setattr(cpu, "ISA", isa)
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(said(model, x, 3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found) and far(found[0], before) < TOLERANCE[dtype]


def test_generate_writes_the_same_text(steps: list[int]):
    model, x = made("llama", "vptq"), tokens(5)
    settings = {"attention_mask": torch.ones_like(x), "max_new_tokens": 20, "do_sample": False}
    before = model.generate(x, **settings)
    assert speed_up(model) is None
    steps.clear()
    assert torch.equal(model.generate(x, **settings), before) and len(steps) == 19
    assert torch.equal(model.generate(x, num_beams=1, **settings | {"max_new_tokens": 3}), before[:, :8])


def test_what_is_no_step_goes_through_the_model(steps: list[int]):
    plain, model, x = made("llama"), made("llama"), tokens(6)
    assert speed_up(model) is None
    steps.clear()

    def both(*args, **kwargs):
        found = []
        for one in (plain, model):
            cache = DynamicCache(config=one.config)
            one(x.expand(kwargs.pop("batch", 1), -1) if "batch" in kwargs else x, use_cache=True, **given(one, cache))
            found.append(one(*args, use_cache=True, **given(one, cache), **kwargs).logits)
        assert torch.equal(*found)

    with torch.inference_mode():
        both(tokens(2))
        both(tokens(1), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]]))
        both(tokens(1), position_ids=torch.tensor([[9]]))
        both(tokens(1), output_hidden_states=True)
        model.config.output_hidden_states = True
        both(tokens(1))
        model.config.output_hidden_states = False
        found = model(tokens(1), return_dict=False, **given(model, DynamicCache(config=model.config)))
        assert isinstance(found, tuple)
        both(None, inputs_embeds=plain.get_input_embeddings()(tokens(1)))
        assert torch.equal(plain(x).logits, model(x).logits) and torch.equal(plain(x[:, :1]).logits, model(x[:, :1]).logits)
        wide = tokens(5, batch=3)
        assert torch.equal(said(plain, wide, 3), said(model, wide, 3))
        compressed = [said_with(one, x, PyramidCache(one.config, 3.0, recent=2)) for one in (plain, model)]
        assert torch.equal(*compressed)
    both(tokens(1))  # with gradients
    model.double()
    assert torch.equal(plain.double()(x).logits, model(x).logits)
    with torch.inference_mode():
        both(tokens(1))
    assert not steps


@torch.inference_mode()
def said_with(model: nn.Module, x: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    model(x[:, :3], use_cache=True, **given(model, cache))
    return torch.stack([model(x[:, t : t + 1], use_cache=True, **given(model, cache)).logits for t in range(3, 6)])


def test_copies_and_second_calls_and_tokens_that_are_none(steps: list[int]):
    """A copy has weights of its own; and what is no token is refused by the model, not read from memory."""
    model, x = made("llama"), tokens(6)
    names = list(inspect.signature(model.forward).parameters)
    assert speed_up(model) is None and speed_up(model) is None
    assert list(inspect.signature(model.forward).parameters) == names
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.embed_tokens.weight.neg_()
    steps.clear()
    assert far(said(copied, x, 3), said(model, x, 3)) > 0.1 and len(steps) == 3
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(x, use_cache=True, **given(model, cache))
        for token in (64, -1):
            with pytest.raises(IndexError):
                model(torch.tensor([[token]]), use_cache=True, **given(model, cache))
    other = made("llama")
    other.forward = lambda *args, **kwargs: None
    assert "replaced" in speed_up(other)


def test_threads_do_not_disturb_each_other():
    model, x = made("llama", "vptq"), tokens(40)
    assert speed_up(model) is None
    alone = said(model, x, 3)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, alone) for found in pool.map(lambda _: said(model, x, 3), range(8)))


def test_beams_and_rewinding_after_steps(steps: list[int]):
    plain, model, x = made("llama"), made("llama"), tokens(5)
    assert speed_up(model) is None
    settings = {"attention_mask": torch.ones_like(x), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(plain.generate(x, num_beams=3, **settings), model.generate(x, num_beams=3, **settings))
    found = []
    with torch.inference_mode():
        for one in (plain, model):
            cache = DynamicCache(config=one.config)
            one(x[:, :3], use_cache=True, **given(one, cache))
            one(x[:, 3:4], use_cache=True, **given(one, cache))
            cache.crop(-2)
            one(tokens(3), use_cache=True, **given(one, cache))
            found.append(one(x[:, 4:], use_cache=True, **given(one, cache)).logits)
    assert far(*found) < 1e-5 and len(steps) > 2


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_part() -> nn.Module:
    model = made("llama")
    model.model.layers[1].mlp.gate_up = nn.Linear(2, 2)
    return model


def with_other_linear() -> nn.Module:
    model = made("llama")
    model.model.layers[0].mlp.up_proj = Doubled(48, 112)
    return model


def with_other_sum() -> nn.Module:
    model = made("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)
    return model


def with_other_rope() -> nn.Module:
    model = made("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    return model


def with_packed_head() -> nn.Module:
    model = made("llama")
    model.set_output_embeddings(made("llama", "vptq").model.layers[0].mlp.up_proj)
    return model


STRANGE = {
    "no layers": lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)),
    "parts that Llama's have not": with_part,
    "a linear is a Doubled": with_other_linear,
    "than its parts suggest": with_other_sum,
    "rotary embedding": with_other_rope,
    "no multiple of 16": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "head_dim": 8})),
    "its head is no plain linear": with_packed_head,
    "next to no vocabulary": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 8})),
    "is of another kind": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),
    "see all tokens": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
}


@pytest.mark.parametrize("why", STRANGE)
def test_other_models_stay_as_they_are(why: str):
    model = STRANGE[why]().eval()
    forward, found = model.forward, speed_up(model)
    assert found and why in found, found
    assert model.forward == forward


def test_forced_kernels_and_a_missing_library_are_heeded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VOROQ_KERNEL", "reference")
    assert "VOROQ_KERNEL" in speed_up(made("llama"))
    monkeypatch.delenv("VOROQ_KERNEL")
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(Unfit, match="doctor"):
        Decoder(made("llama"))


def states(count: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(batch, 3, count, 8) for _ in range(2))


def test_a_roomy_layer_is_a_dynamic_one():
    """Whatever is done to both, they hold the same."""
    first = states(5)
    plain, roomy = DynamicLayer(), RoomyLayer()
    same = lambda: torch.equal(plain.keys, roomy.keys) and torch.equal(plain.values, roomy.values)  # noqa: E731
    for change in (
        lambda layer: layer.update(*first),
        lambda layer: layer.update(*states_of(300)),
        lambda layer: layer.crop(-4),
        lambda layer: layer.update(*states_of(2)),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.update(*states_of(1)),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 3])),
        lambda layer: layer.update(*states_of(1)),
        lambda layer: layer.reset(),
        lambda layer: layer.update(*states_of(3)),
    ):
        change(plain), change(roomy)
        assert (plain.keys is None and roomy.keys is None) or same()
        assert plain.get_seq_length() == roomy.get_seq_length()


def states_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(count)
    return tuple(torch.randn(2, 3, count, 8, generator=rng) for _ in range(2))


def test_a_roomy_layer_copies_new_tokens_only():
    layer = RoomyLayer()
    layer.update(*states(5))
    buffers = layer.buffers
    layer.update(*states(1))
    assert layer.buffers is buffers and layer.keys.data_ptr() == buffers[0].data_ptr()
    with torch.inference_mode():
        layer.update(*states(1000))
    layer.update(*states(1))  # what was made in inference mode may not be written to outside of it
    assert layer.get_seq_length() == 1007 and not layer.keys.is_inference()
