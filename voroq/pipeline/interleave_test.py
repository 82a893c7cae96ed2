"""An order of channels that deals out sizes, changes no function, and is found in whatever module has such channels."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from voroq.methods import GPTQ, PVQ, VPTQ, spans_rows
from voroq.pipeline.interleave import interleave, strata
from voroq.pipeline.run_test import logits, original
from voroq.pipeline.tiny_models_test import tiny_model
from voroq.pipeline.tiny_runs_test import content, quick_run, tiny_source


@pytest.mark.parametrize("n", [4, 24, 40, 64, 1024, 11008])
def test_every_aligned_run_holds_one_of_each_stratum_at_its_own_place(n: int):
    sizes = torch.randn(n, generator=torch.Generator().manual_seed(n))
    order = strata(sizes)
    assert torch.equal(order.sort().values, torch.arange(n))
    ranks = sizes.argsort(descending=True).argsort()[order]
    for run in (2**m for m in range(1, int(math.log2(n & -n)) + 1)):
        quantiles = (ranks * run // n).view(-1, run)
        assert torch.equal(quantiles, quantiles[:1].expand_as(quantiles))
        assert torch.equal(quantiles[0].sort().values, torch.arange(run))


def test_equal_channels_and_odd_numbers_of_them_stay():
    assert torch.equal(strata(torch.randn(37)), torch.arange(37)) and torch.equal(strata(torch.randn(38)), torch.arange(38))
    assert torch.equal(strata(torch.zeros(8)).sort().values, torch.arange(8))


class Mlp(nn.Module):
    """Gated, or fused and gated, or plain; what is done to the channels in between is `act`."""

    def __init__(self, fused: bool, act: nn.Module, *, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32 if fused else 16, bias=bias)
        self.down = nn.Linear(16, 8)
        self.fused, self.act = fused, act
        if not fused:
            self.gate = nn.Linear(8, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(x).chunk(2, dim=-1) if self.fused else (self.gate(x), self.up(x))
        return self.down(self.act(a) * b)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


def moved(module: nn.Module, wanted=lambda name: True) -> bool:
    """Whether the channels of `module` were reordered; asserts that it computes the same."""
    block, x = Block(module), torch.randn(5, 8)
    before, weights = module(x), copy.deepcopy(module.state_dict())
    interleave(block, "model.layers.3", wanted)
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)
    return any(not torch.equal(weights[name], value) for name, value in module.state_dict().items())


def test_channels_move_where_the_function_stays():
    assert moved(Mlp(False, nn.SiLU())) and moved(Mlp(True, nn.GELU()))
    assert moved(Mlp(False, nn.Softmax(dim=-1)))  # of all channels alike
    assert not moved(Mlp(False, nn.LayerNorm(16).requires_grad_(False), bias=True))  # a bias would stay behind
    mixing = nn.LayerNorm(16)
    nn.init.normal_(mixing.weight)
    assert not moved(Mlp(False, mixing))  # gains of the channels would stay behind
    names = []
    assert moved(Mlp(False, nn.SiLU()), lambda name: not names.append(name))
    assert sorted(names) == [f"model.layers.3.mlp.{name}" for name in ("down", "gate", "up")]
    assert not moved(Mlp(False, nn.SiLU()), lambda name: not name.endswith("gate"))


@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPTNeoX", "Qwen3Moe"])
def test_blocks_of_models_compute_the_same(name: str):
    """Attention stays as it is, with as many keys as queries too."""
    model = tiny_model(name)
    before = logits(model)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    weights = [copy.deepcopy(block.state_dict()) for block in blocks]
    for i, block in enumerate(blocks):
        interleave(block, f"{i}", lambda name: True)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    after = [block.state_dict() for block in blocks]
    changed = {key for old, new in zip(weights, after, strict=True) for key in old if not torch.equal(old[key], new[key])}
    assert bool(changed) == (name != "GPTNeoX")  # whose linears have biases
    assert all("mlp" in key for key in changed)


def test_only_vectors_across_rows_ask_for_it():
    assert spans_rows(VPTQ(vector_length=2)) and spans_rows(PVQ()) and not spans_rows(PVQ(along="input"))
    assert not spans_rows(VPTQ(vector_length=1)) and not spans_rows(GPTQ()) and not spans_rows(None)


@pytest.mark.parametrize("name", ["Llama", "Phi3", "Qwen3Moe"])
def test_a_run_stores_what_computes_the_same(name: str, tmp_path):
    """Nearly without loss: linears in orders that do not belong together would answer something else."""
    source, before = tiny_source(tmp_path / "in", name), logits(original(name))
    found, bytes_ = [], []
    for wanted in (True, False):
        out = tmp_path / f"out-{wanted}"
        quick_run(source, out, VPTQ(vector_length=2, table_bits=10), interleave=wanted, hessian="input")
        found.append(logits(AutoModelForCausalLM.from_pretrained(out)))
        bytes_.append(content(out))
    assert all(float((one - before).norm() / before.norm()) < 0.02 for one in found)
    assert bytes_[0] != bytes_[1]
