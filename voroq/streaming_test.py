"""Quantizing while loading against quantizing by hand: the same linears, the same bytes, one weight in memory at a time."""

import gc
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import voroq
from voroq.errors import FormatError, VoroqError
from voroq.experts import unstack_experts
from voroq.integrations.conftest import MODELS, tiny, write_tokenizer
from voroq.integrations.transformers import quant_linears
from voroq.methods import PVQ, RTN
from voroq.moments import Moments
from voroq.packed.format import pack, unpack
from voroq.pipeline.plan import Plan
from voroq.pipeline.work import generator
from voroq.quantized import narrow
from voroq.tuning.scales import refit_levels, refit_rows

TOKENS = torch.arange(3, 19)[None]


def stream(folder, config=None, **options):
    config = config or voroq.VoroqConfig(method=PVQ(bits=3.0, dim=8))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def sites(model) -> dict[str, nn.Linear]:
    dense = unstack_experts(model)
    routers = ("gate",) if "Moe" in type(model).__name__ or "Mixtral" in type(model).__name__ else ()
    named = dense.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) and ".layers." in name and name.rpartition(".")[2] not in routers}


@pytest.mark.parametrize("kind", MODELS)
def test_every_linear_is_what_the_method_makes_of_its_weight(tmp_path, kind):
    tiny(kind).save_pretrained(tmp_path)
    model, method = stream(tmp_path), PVQ(bits=3.0, dim=8)
    layers, dense = quant_linears(model), sites(tiny(kind))
    assert set(layers) == set(dense)
    for name, linear in dense.items():
        w = linear.weight.detach().float()
        made = pack(method(w, Moments.empty(w.shape[1]), generator(0, name)), torch.float32, "voroq")
        stored = layers[name].packed()
        assert stored.spec == made.spec
        for local, tensor in made.tensors.items():
            assert torch.equal(stored.tensors[local], tensor), (name, local)
        assert (linear.bias is None) == (layers[name].bias is None) and (linear.bias is None or torch.equal(layers[name].bias, linear.bias))
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_and_loaded_again_is_the_same_model(tmp_path, kind):
    tiny(kind).save_pretrained(tmp_path / "plain")
    model = stream(tmp_path / "plain", dtype=torch.bfloat16)
    logits = model(TOKENS).logits
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert logits.dtype == torch.bfloat16 and torch.equal(again(TOKENS).logits, logits)
    assert set(quant_linears(again)) == set(quant_linears(model))
    write_tokenizer(tmp_path / "saved")
    assert torch.equal(voroq.load(tmp_path / "saved")[0](TOKENS).logits, logits)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert sum(name.endswith(".weight_codes") for name in stored) == len(quant_linears(model))
    assert torch.allclose(stream(tmp_path / "plain").dequantize()(TOKENS).logits, stream(tmp_path / "plain")(TOKENS).logits, atol=1e-5)
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 19)


@dataclass(frozen=True)
class Watching:
    """RTN that looks whether the weights it saw before are gone."""

    seen: list = field(default_factory=list)

    def __call__(self, w, moments, rng):
        gc.collect()
        assert [ref() for ref in self.seen if ref() is not None] == []
        self.seen.append(weakref.ref(w))
        return RTN(bits=4, group_size=None)(w, moments, rng)

    def __deepcopy__(self, memo):
        return self


def test_only_one_weight_is_there_in_full(tmp_path):
    tiny("llama").half().save_pretrained(tmp_path)
    method = Watching()
    stream(tmp_path, voroq.VoroqConfig(method=method))
    assert len(method.seen) == 14


def test_a_budget_counts_everything_stored_and_a_plan_leaves_out(tmp_path):
    tiny("llama").half().save_pretrained(tmp_path)
    layers = quant_linears(stream(tmp_path, voroq.VoroqConfig(method="pvq", bits=4, rotation="none")))
    bits = sum(8 * t.numel() * t.element_size() for layer in layers.values() for t in layer.packed().tensors.values())
    assert 3.5 < bits / sum(layer.in_features * layer.out_features for layer in layers.values()) <= 4.0
    assert not any("weight_signs_in" in layer.packed().tensors for layer in layers.values())
    plan = Plan(PVQ(bits=3.0), (("*.mlp.*", None),))
    assert {name.split(".")[3] for name in quant_linears(stream(tmp_path, voroq.VoroqConfig(method=plan)))} == {"self_attn"}


def test_the_seed_decides(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    a, b, c = (stream(tmp_path, voroq.VoroqConfig(method="pvq", bits=4, seed=seed))(TOKENS).logits for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_what_cannot_be_done_is_said(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(VoroqError, match="unknown method 'pqv'"):
        voroq.VoroqConfig(method="pqv", bits=3)
    with pytest.raises(VoroqError, match="bits and options go with the name of a method"):
        voroq.VoroqConfig(method=PVQ(), bits=3)
    with pytest.raises(VoroqError, match="leaves every linear of the model as it is"):
        stream(tmp_path, voroq.VoroqConfig(method=Plan(None)))
    with pytest.raises(VoroqError, match="cannot be reached by pvq"):
        stream(tmp_path, voroq.VoroqConfig(method="pvq", bits=0.5))
    with pytest.raises(VoroqError, match="disk"):
        stream(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * torch.nan}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VoroqError, match=rf"{name} holds NaN"):
        stream(tmp_path)
    save_file({key: t for key, t in tensors.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=f"{name} is missing"):
        stream(tmp_path)


@pytest.mark.parametrize("along", ["output", "input"])
def test_without_data_is_the_identity_hessian(along):
    """The words of the fast path are those of feedback under H = I, and scales are refitted to the same exact optimum."""
    w, rng = torch.randn(45, 64, generator=torch.Generator().manual_seed(3)), torch.Generator()
    method = PVQ(bits=3.0, along=along, rotation="none", sweeps=0, damping=0.0)
    fast = method(w, Moments.empty(64), rng)
    slow = method(w, Moments(torch.eye(64), torch.zeros(64), 1), rng)
    assert torch.equal(fast.codes[0], slow.codes[0])
    assert torch.allclose(fast.dequantize(), slow.dequantize(), atol=1e-5)
    better = replace(method, sweeps=3)(w, Moments.empty(64), rng)
    assert (better.dequantize() - w).square().sum() < (fast.dequantize() - w).square().sum()


def test_refits_without_a_hessian_are_those_of_the_identity():
    w, rng = torch.randn(32, 48, generator=torch.Generator().manual_seed(4), dtype=torch.float64), torch.Generator()
    band = PVQ(bits=2.0, rotation="none")._fit(w)
    codes = band.encode(w)
    for refit in (refit_rows, refit_levels):
        a, b = refit(w, None, band, codes), refit(w, torch.eye(48, dtype=torch.float64), band, codes)
        assert torch.allclose(a.decode(codes, 32), b.decode(codes, 32), atol=1e-12)
        assert (a.decode(codes, 32) - w).square().sum() < (band.decode(codes, 32) - w).square().sum()
    q = PVQ(bits=2.0)(w.float(), Moments.empty(48), rng)
    assert torch.equal(unpack(pack(q, torch.float16, "voroq")).dequantize(), narrow(q, torch.float16).dequantize())
