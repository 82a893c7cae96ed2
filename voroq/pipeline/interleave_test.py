"""An order of channels that deals out sizes, changes no function, and is found in whatever module has such channels."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from voroq.methods import GPTQ, PVQ, VPTQ, tile_height
from voroq.pipeline.interleave import interleave, strata
from voroq.pipeline.run_test import logits, original
from voroq.pipeline.tiny_models_test import tiny_model
from voroq.pipeline.tiny_runs_test import content, quick_run, tiny_source


@pytest.mark.parametrize("n", [4, 24, 37, 1024, 11008])
@pytest.mark.parametrize("height", [2, 3, 4, 5, 16])
def test_every_place_of_a_tile_has_a_stratum_of_its_own(n: int, height: int):
    sizes = torch.randn(n, generator=torch.Generator().manual_seed(n))
    for heights in ([height], [height, height]):
        order = strata(sizes, heights)
        assert torch.equal(order.sort().values, torch.arange(n))
        places = [sizes[order][place::height] for place in range(height)]
        for larger, smaller in itertools.pairwise(part for part in places if len(part)):
            assert larger.min() >= smaller.max()


def test_tiles_of_two_heights_both_get_some_of_it():
    """What is left where bits go by what the strata cost: the geometric mean of that over the mean."""
    costs = torch.randn(1020, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()

    def left(heights: list[int], height: int) -> float:
        dealt = costs[strata(costs, heights)]
        means = torch.stack([dealt[place::height].mean() for place in range(height)])
        return float(means.log().mean().exp() / means.mean())

    for height in (3, 4):
        assert left([height], height) < left([3, 4], height) < 0.95


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


def moved(module: nn.Module, height=lambda name: 4) -> bool:
    """Whether the channels of `module` were reordered; asserts that it computes the same."""
    block, x = Block(module), torch.randn(5, 8)
    before, weights = module(x), copy.deepcopy(module.state_dict())
    interleave(block, "model.layers.3", height)
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
    assert moved(Mlp(False, nn.SiLU()), lambda name: names.append(name) or 2)
    assert sorted(names) == [f"model.layers.3.mlp.{name}" for name in ("down", "gate", "up")]
    assert not moved(Mlp(False, nn.SiLU()), lambda name: None if name.endswith("gate") else 4)  # stored as it is
    assert not moved(Mlp(False, nn.SiLU()), lambda name: 4 if name.endswith("down") else 1)  # no tile spans channels


def test_what_moved_is_named_together():
    assert interleave(Block(Mlp(False, nn.SiLU())), "b", lambda name: 2) == [("b.mlp.up", "b.mlp.gate")]
    assert interleave(Block(Mlp(True, nn.SiLU())), "b", lambda name: 2) == [("b.mlp.up",)]


@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPTNeoX", "Qwen3Moe"])
def test_blocks_of_models_compute_the_same(name: str):
    """Attention stays as it is, with as many keys as queries too."""
    model = tiny_model(name)
    before = logits(model)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    weights = [copy.deepcopy(block.state_dict()) for block in blocks]
    for i, block in enumerate(blocks):
        interleave(block, f"{i}", lambda name: 3)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    after = [block.state_dict() for block in blocks]
    changed = {key for old, new in zip(weights, after, strict=True) for key in old if not torch.equal(old[key], new[key])}
    assert bool(changed) == (name != "GPTNeoX")  # whose linears have biases
    assert all("mlp" in key for key in changed)


def test_how_many_rows_a_vector_spans():
    heights = {VPTQ(vector_length=3): 3, PVQ(dim=8): 8, PVQ(along="input"): 1, GPTQ(): 1, None: None}
    assert {method: tile_height(method) for method in heights} == heights


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
