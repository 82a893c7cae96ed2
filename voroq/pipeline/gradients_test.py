"""The streamed backward pass held against autograd on the whole model."""

import pytest
import torch

from voroq.errors import VoroqError
from voroq.experts import unstack_experts
from voroq.pipeline.gradients import GROUPS, PRIOR, gradient_windows, observe_guided, observe_outputs, output_gradients, stored_bytes
from voroq.pipeline.observe_test import prepared
from voroq.pipeline.progress import Silent
from voroq.pipeline.tiny_models_test import CONFIGS

BATCH = 2


Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def explicit(model: torch.nn.Module, names: set[str], tokens: torch.Tensor, seed: int) -> Pairs:
    """Whole model, one window at a time, the same labels: the inputs of `names` and the gradients at their outputs, of every token."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.cat([torch.rand(part.numel(), 64, generator=rng) for part in tokens.split(BATCH)]).clamp_min(1e-20)
    noise = noise.reshape(*tokens.shape, -1)
    model = unstack_experts(model)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keep(name: str):
        def hook(_, args, output):
            output.retain_grad()
            outputs[name].append(output)
            inputs[name].append(args[0].detach())

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    for window, own in zip(tokens, noise, strict=True):
        log_q = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
        labels = (log_q.detach() - (-own.log()).log()).argmax(-1)
        log_q.gather(1, labels[:, None]).sum().backward()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, parts in outputs.items():
        gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
        found[name] = tuple(
            torch.cat([t.reshape(-1, t.shape[-1]) for t in both]).double() if parts else torch.zeros(0, 1)
            for both in (inputs[name], gradients)
        )
    return found


def literal(pairs: Pairs) -> dict[str, torch.Tensor]:
    """E[g g^T], filled in."""
    found = {}
    for name, (_, g) in pairs.items():
        second, d = sum((torch.outer(row, row) for row in g), torch.zeros(g.shape[1], g.shape[1])), g.shape[1]
        even = torch.eye(d) * second.diagonal().mean() / max(len(g), 1)
        found[name] = (second + PRIOR * d * even) / (len(g) + PRIOR * d)
    return found


def literal_guided(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """For every group of rows the mean over tokens and rows of g_j^2 x x^T, an outer product at a time."""
    edges = [len(part) for part in torch.arange(g.shape[1]).tensor_split(GROUPS)]
    found, first = [], 0
    for size in edges:
        total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for token, gradient in zip(x, g, strict=True):
            total += sum(gradient[j] ** 2 for j in range(first, first + size)) / size * torch.outer(token, token)
        found.append(total / max(len(x), 1))
        first += size
    return torch.stack(found)


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "Bert"])
def test_output_moments_are_those_of_explicit_gradients_of_every_token(name, limit, tmp_path):
    whole, tokens, model, states = prepared(name, tmp_path)
    stores = output_gradients(model, tokens, states, BATCH, seed=5, limit=limit, folder=tmp_path, progress=Silent())
    spilled = sum(store.bytes for store in stores if store.spilled)
    assert stored_bytes(*tokens.shape, BATCH, stores[0].shape[2], model.n_blocks, limit) == spilled
    assert all(store.spilled == (limit == 0) for store in stores)
    pairs = explicit(whole, {site.name for index in range(model.n_blocks) for site in model.sites(index)}, tokens, 5)
    expected = literal(pairs)
    entering = states
    for index in range(model.n_blocks):
        block, names = model.load_block(index), [site.name for site in model.sites(index)]
        found = observe_outputs(model, block, index, entering, stores[index], BATCH, sites=names)
        guided = observe_guided(model, block, index, entering, stores[index], BATCH, sites=names)
        for site in names:
            if len(pairs[site][0]):
                twin = literal_guided(*pairs[site])
                torch.testing.assert_close(guided[site].double(), twin, rtol=2e-3, atol=1e-3 * float(twin.abs().max()))
            if float(expected[site].abs().max()):
                torch.testing.assert_close(found[site].double(), expected[site], rtol=2e-3, atol=1e-3 * float(expected[site].abs().max()))
        with torch.no_grad():
            for start in range(0, len(tokens), BATCH):
                hidden = entering.read(start, min(start + BATCH, len(tokens)))
                entering.write(start, model.forward_block(block, index, hidden))
        model.drop_block(index)


def test_windows_come_in_whole_batches_or_all():
    assert gradient_windows(512, 256, 16) == 256
    assert gradient_windows(100, 256, 16) == 100
    assert gradient_windows(512, 1 << 20, 1) == 1


def test_gradients_that_overflow_are_refused_with_a_way_out(tmp_path):
    _, tokens, model, states = prepared("Llama", tmp_path)
    real = model.head

    def broken():
        context = real()

        class Head:
            def __enter__(self):
                logits = context.__enter__()
                return lambda ids, hidden: logits(ids, hidden) * float("inf")

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Head()

    model.head = broken
    with pytest.raises(VoroqError, match="--hessian input"):
        output_gradients(model, tokens, states, BATCH, seed=0, limit=1 << 30, folder=tmp_path, progress=Silent())
