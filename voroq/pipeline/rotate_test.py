"""A rotated model is the same function in float64, near in float16, the same bytes every time; what cannot be rotated is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from voroq.errors import VoroqError
from voroq.numerics.hadamard import random_signs, rotate
from voroq.pipeline import fold, tiny_models_test
from voroq.pipeline.compat import build_skeleton
from voroq.pipeline.fold import Fold
from voroq.pipeline.heads import find_heads
from voroq.pipeline.roles import find_roles
from voroq.pipeline.rotate import rotate_model
from voroq.pipeline.tiny_models_test import save_tiny, tiny_tokens

MORE = {"Gemma": {**tiny_models_test._GROUPED, "head_dim": 8}, "Granite": tiny_models_test._GROUPED, "Olmo2": tiny_models_test._GROUPED}
MODELS = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {},
    "Phi3": {},
    "Gemma": {},
    "Granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
}
VALUES = {"Phi3": ("qkv_proj", (48, 64))}


@pytest.fixture(autouse=True)
def _more_models(monkeypatch):
    for name, config in MORE.items():
        monkeypatch.setitem(tiny_models_test.CONFIGS, name, config)


class ExactNorm(nn.Module):
    """An RMS norm in float64 throughout (those of transformers compute in float32 whatever comes in)."""

    def __init__(self, gain: Tensor, epsilon: float):
        super().__init__()
        self.gain, self.epsilon = gain, epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.gain


def exact(folder: Path) -> PreTrainedModel:
    """The model in `folder` with every norm exact, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            gain = module.weight.detach().double() + ("Gemma" in type(module).__name__)
            model.set_submodule(name, ExactNorm(gain, getattr(module, "variance_epsilon", getattr(module, "eps", None))))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(tiny_tokens()).logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_change_in_float64(tmp_path, name, heads):
    save_tiny(name, tmp_path / "in", **MODELS[name])
    report = rotate_model(tmp_path / "in", tmp_path / "out", seed=3, heads=heads, dtype="float64")
    assert report["heads"] == (3 if heads else 0)
    assert distance(logits(exact(tmp_path / "in")), logits(exact(tmp_path / "out"))) < 1e-10
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
    moved = {key for key in before if before[key].dim() == 2 and distance(before[key].double(), after[key]) > 0.1}
    assert moved == {key for key in before if before[key].dim() == 2}
    gain = after["model.layers.0.input_layernorm.weight"]
    assert torch.equal(gain, torch.full_like(gain, 0.0 if name == "Gemma" else 1.0))


@pytest.mark.parametrize("name", MODELS)
def test_values_and_their_readers_are_found_without_names(tmp_path, name):
    save_tiny(name, tmp_path, **MODELS[name])
    skeleton = build_skeleton(tmp_path, dtype=torch.float64)
    roles = find_roles(skeleton)
    assert len(roles.norms) == 7 and roles.embeddings == ("model.embed_tokens",) and len(roles.writers) == 6
    value, rows = VALUES.get(name, ("v_proj", None))
    for block, heads in enumerate(find_heads(skeleton, roles)):
        prefix = f"model.layers.{block}.self_attn"
        assert (heads.value, heads.output) == (f"{prefix}.{value}", f"{prefix}.o_proj")
        assert heads.rows == (rows or (0, skeleton.get_submodule(heads.value).out_features))


def test_heads_are_rotated_only_if_wanted(tmp_path):
    save_tiny("Llama", tmp_path / "in")
    for folder, heads in (("with", True), ("without", False)):
        rotate_model(tmp_path / "in", tmp_path / folder, heads=heads)
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("with", "without"))
    assert {key.split(".")[-2] for key in one if not torch.equal(one[key], other[key])} == {"v_proj", "o_proj"}


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_stored_as_float16_it_is_near(tmp_path, name):
    tiny = save_tiny(name, tmp_path / "in", dtype="float16")
    tiny.half().save_pretrained(tmp_path / "in")
    rotate_model(tmp_path / "in", tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert 1e-6 < distance(logits(exact(tmp_path / "in")), logits(exact(tmp_path / "out"))) < 0.01


def test_a_tied_head_is_untied_and_shards_stay_shards(tmp_path):
    save_tiny("Qwen3", tmp_path / "in", shards="20KB")
    report = rotate_model(tmp_path / "in", tmp_path / "out", dtype="float32")
    assert report["untied"]
    files = [sorted(path.name for path in (tmp_path / folder).glob("*.safetensors")) for folder in ("in", "out")]
    assert files[0] == files[1] and len(files[0]) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.config.tie_word_embeddings and not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "in")), logits(model)) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_same_seed_same_bytes(tmp_path):
    save_tiny("Llama", tmp_path / "in")
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        rotate_model(tmp_path / "in", tmp_path / folder, seed=seed)
    first, second, third = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc")
    assert first == second != third


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("GPTNeoX", "input_layernorm .LayerNorm. is no RMS norm"),
        ("OPT", "goes into model.decoder.project_in, without a norm"),
        ("Bert", "LayerNorm. is no RMS norm"),
        ("Gemma2", "an addition of what is no linear's output"),
        ("Olmo2", "goes into model.layers.0.self_attn.q_proj, without a norm"),
        ("Mixtral", "which is no nn.Linear"),
        ("Qwen3Moe", "experts.gate_up_proj .* which is no nn.Linear"),
    ],
)
def test_what_cannot_be_rotated_is_refused_before_anything_is_written(tmp_path, name, reason):
    save_tiny(name, tmp_path / "in")
    with pytest.raises(VoroqError, match=f"cannot be rotated: .*{reason}"):
        rotate_model(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_requests_are_refused(tmp_path):
    save_tiny("Llama", tmp_path / "in")
    with pytest.raises(VoroqError, match="dtype 'int4' is unknown"):
        rotate_model(tmp_path / "in", tmp_path / "out", dtype="int4")
    with pytest.raises(VoroqError, match="exists; choose a new folder"):
        rotate_model(tmp_path / "in", tmp_path / "in")


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "holds NaN or infinity"), (3e4, "does not fit torch.float16; store the model as float32")]
)
def test_numbers_that_are_not_or_do_not_fit_are_refused(tmp_path, value, message):
    save_tiny("Llama", tmp_path / "in").half().save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = value
    tensors["model.layers.1.post_attention_layernorm.weight"][:] = 3.0
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VoroqError, match=message):
        rotate_model(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("case", ["reader", "writer", "writer of averages", "values"])
def test_parts_of_a_weight_are_folded_as_the_whole(monkeypatch, case):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(24, 12, generator=rng, dtype=torch.float64)
    rows, columns, four = random_signs(24, rng), random_signs(12, rng), random_signs(4, rng)
    gain = torch.rand(12, generator=rng, dtype=torch.float64)
    made, expected = {
        "reader": (Fold(gain=gain, reads=columns), rotate(w * gain, columns)),
        "writer": (Fold(writes=rows), rotate(w.T, rows).T),
        "writer of averages": (
            Fold(writes=rows, averages=four),
            rotate(torch.cat([rotate(part, four) for part in w.split(4, dim=1)], 1).T, rows).T,
        ),
        "values": (
            Fold(reads=columns, values=four, rows=(16, 24)),
            torch.cat((rotate(w, columns)[:16], *(rotate(part.T, four).T for part in rotate(w, columns)[16:].split(4)))),
        ),
    }[case]
    torch.testing.assert_close(made.weight(w, torch.float64), expected)
    monkeypatch.setattr(fold, "PART", 5 * 24)
    torch.testing.assert_close(made.weight(w, torch.float64), expected)
