"""Who shares, that it shows in launches and not in results, and whatever must not be mistaken for a shared input."""

import copy
import gc
import io
import subprocess
import sys
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from voroq.experts import unstack_experts
from voroq.integrations import decoder
from voroq.integrations.conftest import random_linear, tiny
from voroq.integrations.siblings import join, share, siblings
from voroq.kernels import triton_kernel
from voroq.layer import QuantLinear
from voroq.packed.conftest import random_vptq
from voroq.packed.format import pack


@pytest.fixture
def interpreted(monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("VOROQ_KERNEL", "triton")


def quantized(kind: str) -> nn.Module:
    model = unstack_experts(tiny(kind))
    for i, (path, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Linear) and ".layers." in path:
            layout = "vptq" if i % 3 else "voroq"
            packed = pack(random_linear(*module.weight.shape, i, layout), torch.float32, layout)
            model.set_submodule(path, QuantLinear.holding(packed, module.bias))
    return model.requires_grad_(False)


def names(model: nn.Module, found: list[tuple[QuantLinear, ...]]) -> list[list[str]]:
    known = {module: path.removeprefix("model.layers.") for path, module in model.named_modules()}
    return [[known[module] for module in members] for members in found]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3-moe"])
def test_a_run_shows_who_reads_what_others_read(kind, interpreted):
    """Gate and up of an expert are one linear already (`experts.py`)."""
    model, found = quantized(kind), []
    for layer in range(2):
        found.append([f"{layer}.self_attn.{side}_proj" for side in "qkv"])
        found += [] if "moe" in kind else [[f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]]
    assert names(model, siblings(model, lambda: model(input_ids=torch.arange(3)[None]))) == found
    assert all(getattr(m, "together", None) is None for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_makes_the_same_tokens_with_fewer_products(kind, interpreted, monkeypatch):
    model, tokens, made = quantized(kind), torch.tensor([[5, 9, 2, 30, 7]]), []
    own = triton_kernel.matmuls
    monkeypatch.setattr(triton_kernel, "matmuls", lambda x, several: made.append(len(several)) or own(x, several))
    asked = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    alone = model.generate(tokens, **asked)
    assert Counter(made) == {1: 3 * 2 * 7}
    made.clear()
    assert share(model) is None
    together = model.generate(tokens, **asked)
    assert Counter(made) == {3: 3 * 2, 2: 3 * 2, 1: 3 * 2 * 2}
    assert torch.equal(together.sequences, alone.sequences)
    assert all(torch.equal(a, b) for a, b in zip(together.logits, alone.logits, strict=True))


def test_why_nothing_is_shared(interpreted, monkeypatch):
    assert share(tiny("llama")) == "no two of its linears read one input and have kernels that multiply them together"
    monkeypatch.setenv("VOROQ_KERNEL", "reference")
    assert share(quantized("llama")) is not None
    assert share(Trio()) == "a trial run of three tokens failed (AttributeError: 'Trio' object has no attribute 'get_input_embeddings')"


def test_on_cuda_this_is_how_a_model_is_sped_up(monkeypatch):
    class Elsewhere(nn.Module):
        def parameters(self, recurse: bool = True):
            return iter([type("OnCuda", (), {"is_cuda": True})()])

    monkeypatch.setattr(decoder, "share", lambda model: "asked")
    assert decoder.speed_up(Elsewhere()) == "asked"


class Trio(nn.Module):
    """Three linears of one input; `calls` counts which were computed, and how many at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            QuantLinear.holding(pack(random_vptq(out, 24, out), torch.float32, "vptq"), bias)
            for out, bias in ((20, None), (12, torch.arange(12.0)), (7, None))
        )

    def each(self) -> tuple[QuantLinear, ...]:
        return self.a, self.b, self.c

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([each(x) for each in self.each()], -1)


@pytest.fixture
def trio() -> Trio:
    model = Trio()
    join(model.each())
    return model


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many linears each product multiplied, in order."""
    from voroq import layer
    from voroq.integrations import siblings

    found, one, several = [], layer.linear, siblings.linears
    monkeypatch.setattr(layer, "linear", lambda *args: found.append(1) or one(*args))
    monkeypatch.setattr(siblings, "linears", lambda x, t, keys: found.append(len(keys.splitlines())) or several(x, t, keys))
    return found


def alone(module: QuantLinear, x: Tensor) -> Tensor:
    return copy.deepcopy(module)(x)


def rows(seed: int = 0) -> Tensor:
    return torch.randn(2, 24, generator=torch.Generator().manual_seed(seed))


def test_the_first_computes_for_all(trio, calls):
    x = rows()
    results = [each(x) for each in trio.each()]
    assert calls == [3]
    assert all(torch.equal(y, alone(each, x)) for each, y in zip(trio.each(), results, strict=True))
    results[0].fill_(7)
    assert torch.equal(results[2], alone(trio.c, x))


def test_only_the_very_tensor_will_do(trio, calls):
    x = rows()
    trio.a(x)
    assert torch.equal(trio.b(x.clone()), alone(trio.b, x)) and calls[:2] == [3, 1]
    assert torch.equal(trio.b(x.view_as(x)), alone(trio.b, x)) and calls[2:] == [1, 1, 1]


def test_a_tensor_that_was_changed_is_another(trio, calls):
    x = rows()
    trio.a(x)
    x[0, 3] += 1
    assert torch.equal(trio.b(x), alone(trio.b, x)) and calls == [3, 1, 1]


def test_calls_in_any_order_as_often_as_you_like(trio, calls):
    x, other = rows(), rows(1)
    for module, given in ((trio.c, x), (trio.a, x), (trio.a, other), (trio.b, x), (trio.c, other), (trio.c, other), (trio.b, other)):
        assert torch.equal(module(given), alone(module, given))
    assert [n for n in calls if n > 1] == [3, 3]


def test_what_is_not_taken_goes_with_its_tensor(trio, calls):
    x = rows()
    trio.a(x)
    waiting = [weakref.ref(y) for y in trio.a.together.here.held.results.values()]
    assert len(waiting) == 2 and all(y() is not None for y in waiting)
    del x
    gc.collect()
    assert all(y() is None for y in waiting)


def test_what_is_taken_is_let_go(trio):
    x = rows()
    trio.a(x)
    taken = weakref.ref(trio.c(x))  # without a bias: the result itself
    gc.collect()
    assert taken() is None


def test_gradients_are_those_of_separate_calls(trio):
    x, above = rows().requires_grad_(), torch.randn(2, 39)
    (trio(x) * above).sum().backward()
    y = x.detach().requires_grad_()
    (copy.deepcopy(trio)(y) * above).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    x.grad = None
    trio.a(x)
    trio.c(x).sum().backward()  # the others' outputs lead nowhere
    torch.testing.assert_close(x.grad, torch.ones(2, 7) @ trio.c.dequantize().weight)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_recomputed_activations(trio, reentrant):
    found = []
    for model in (trio, copy.deepcopy(trio)):
        x = rows().requires_grad_()
        checkpoint(lambda x, model=model: model(x * 2).square(), x, use_reentrant=reentrant).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_what_was_computed_without_gradients_is_not_taken_with_them(trio, calls):
    x = rows().requires_grad_()
    with torch.no_grad():
        trio.a(x)
    assert trio.b(x).requires_grad
    trio.a(x)
    with torch.no_grad():
        assert not trio.b(x).requires_grad
    assert calls == [3, 1, 3, 1]
    x = rows()
    trio.a(x)
    assert trio.b(x.requires_grad_()).requires_grad


def test_under_inference_mode_nothing_is_shared(trio, calls):
    with torch.inference_mode():
        x = rows()
        trio.a(x)
        x += 1
        assert torch.equal(trio.b(x), alone(trio.b, x))
    assert 3 not in calls


def test_copies_are_on_their_own(trio, calls):
    x, saved = rows(), io.BytesIO()
    torch.save(trio, saved)
    saved.seek(0)
    for other in (copy.deepcopy(trio), torch.load(saved, weights_only=False)):
        assert all(each.together is None for each in other.each())
        assert torch.equal(other(x), trio(x))
    shallow = copy.copy(trio.b)
    calls.clear()
    trio.a(x)
    assert torch.equal(shallow(x), trio.b(x)) and calls == [3, 1]
    assert copy.deepcopy(trio.a).state_dict().keys() == trio.a.state_dict().keys()
    join((other := copy.deepcopy(trio)).each())
    assert other.a.together is not trio.a.together


def test_threads_do_not_take_from_each_other(trio, calls):
    shared = rows()
    trio.a(shared)
    with ThreadPoolExecutor(4) as pool:
        elsewhere = pool.submit(trio.b, shared).result()
        assert calls == [3, 1]
        assert torch.equal(elsewhere, trio.b(shared)) and calls == [3, 1]
        inputs = [rows(seed) for seed in range(40)]
        found = list(pool.map(trio, inputs))
    other = copy.deepcopy(trio)
    assert all(torch.equal(y, other(x)) for x, y in zip(inputs, found, strict=True))


def test_hooks_see_and_change_what_they_always_did(trio, calls):
    seen = []
    trio.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    trio.c.register_forward_hook(lambda module, args, y: seen.append((args[0], y)) or 2 * y)
    x = rows()
    a, b, c = (each(x) for each in trio.each())
    assert torch.equal(b, trio.b.product(x + 1) + trio.b.bias) and torch.equal(c, 2 * trio.c.product(x))
    assert seen[0][0] is x and torch.equal(seen[0][1], trio.c.product(x)) and torch.equal(a, trio.a.product(x))


def test_weights_that_are_elsewhere_are_not_touched(trio, calls):
    trio.c.to("meta")
    x = rows()
    assert torch.equal(trio.a(x), alone(trio.a, x)) and torch.equal(trio.b(x), alone(trio.b, x)) and 3 not in calls


def test_who_is_called_twice_or_with_a_changed_tensor_is_no_sibling(interpreted):
    model = Trio()

    def twice() -> None:
        x = rows()
        model.a(x), model.b(x), model.c(x), model.a(rows(1))

    def changed() -> None:
        x = rows()
        model.a(x), model.b(x), x.add_(1), model.c(x)

    assert siblings(model, twice) == [(model.b, model.c)]
    assert siblings(model, changed) == [(model.a, model.b)]


def test_a_run_that_fails_leaves_nothing_behind(trio):
    with pytest.raises(ZeroDivisionError):
        siblings(trio, lambda: 1 / 0)
    assert all(each.together is None for each in trio.each())


COMPILED = """
import torch
from torch._dynamo.testing import CompileCounter
from voroq.integrations.siblings import join
from voroq.integrations.siblings_test import Trio, rows

class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.change = Trio(), Trio(), False

    def forward(self, x):
        found = []
        for trio in (self.first, self.second):
            x = x * 2
            found += [trio.a(x), trio.b(x)]
            if self.change:
                x.add_(1)
            found.append(trio.c(x))
        return torch.cat(found, -1)

def products(graph):
    return [str(n.target) for n in graph.graph.nodes if str(n.target) in ("voroq.linear", "voroq.linears")]

model, x, graphs = Twice(), rows(), []
expected = {}
for change in (False, True):
    model.change = change
    expected[change] = model(x)
join(model.first.each()), join(model.second.each())
compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
for change in (False, True):
    model.change = change
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(compiled(x), expected[change]) and torch.equal(compiled(x), expected[change])
assert products(graphs[0]) == ["voroq.linears"] * 2, products(graphs[0])
assert products(graphs[-1]) == ["voroq.linears", "voroq.linear"] * 2, products(graphs[-1])
assert len(graphs) == 4 and model.first.a.together.traced is None

model.change = False
x.requires_grad_()
model(x).sum().backward()
own, x.grad = x.grad, None
torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
torch.testing.assert_close(x.grad, own)

x.requires_grad_(False)
for module in model.first.each():  # graphs that call a part of them: right, and compiled once
    counter = CompileCounter()
    part = torch.compile(module, fullgraph=True, backend=counter)
    for seed in range(5):
        assert torch.equal(part(rows(seed)), module.product(rows(seed)) + (0 if module.bias is None else module.bias))
    assert counter.frame_count <= 2
again = torch.compile(model.first.b, fullgraph=True)
torch.compile(model.first.a, fullgraph=True, backend="eager")(x)
x += 1
assert torch.equal(again(x), model.first.b.product(x) + model.first.b.bias)
"""


def test_a_compiled_model_multiplies_them_together_too():
    """In a process of its own, without the checks of shapes that the suite wraps around every function."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
