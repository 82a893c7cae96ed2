"""Gradients of the model's own log-likelihood at the outputs of every block, for a bounded number of windows, one block in memory.

The labels are sampled from the model's answers, so the second moments of these gradients are the Fisher matrix: what they weigh is
the divergence from the original model, not its error on the text. One pass forward keeps what enters each block, one pass backward
puts the gradients in its place, so nothing grows with the depth but a store per block (memory up to a limit, else an unnamed file).
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.pipeline.activations import Activations
from voroq.pipeline.model import OpenModel
from voroq.pipeline.progress import Progress

GRADIENT_TOKENS = 1 << 16
"""Tokens the gradients are taken on: enough for second moments of several thousand outputs."""

GROUPS = 4
"""Groups of rows that have an input moment of their own in the guided form."""

AT_THE_HEAD = 1024
"""Tokens whose logits are held at once."""

PRIOR = 4
"""Samples per direction that a second moment of gradients is topped up with: gradients are heavy-tailed, and few tokens say little."""


def gradient_windows(windows: int, context: int, batch: int) -> int:
    """How many of `windows` get gradients: whole batches, so that blocks are called as they were captured."""
    wanted = max(1, GRADIENT_TOKENS // context // batch) * batch
    return min(windows, wanted)


def stored_bytes(windows: int, context: int, batch: int, width: int, blocks: int, limit: int) -> int:
    """Room on disk that `output_gradients` takes for a model of `width` (float32 at most); 0 where its stores stay in memory."""
    each = gradient_windows(windows, context, batch) * context * width * 4
    return blocks * each if each > limit // blocks else 0


def output_gradients(
    model: OpenModel,
    tokens: Int[Tensor, "windows ctx"],
    states: Activations,
    batch: int,
    *,
    seed: int,
    limit: int,
    folder: Path,
    progress: Progress,
) -> list[Activations]:
    """For every block the gradient at its output [windows ctx d] on the windows `tokens`, the first of those whose states entered
    block 0 in `states`. The stores together stay in memory up to `limit` bytes.

    Raises VoroqError where a gradient is not finite or does not reach a block.
    """
    count = tokens.shape[0]
    shape, each = (count, *states.shape[1:]), limit // model.n_blocks
    stores = [Activations(shape, states.dtype, limit=each, folder=folder) for _ in range(model.n_blocks)]
    spans = [(start, min(start + batch, count)) for start in range(0, count, batch)]
    with torch.no_grad():
        for index in range(model.n_blocks):
            progress.stage(f"passing on, block {index + 1} of {model.n_blocks}")
            block, entering = model.load_block(index), stores[index - 1] if index else states
            for start, stop in spans:
                hidden = entering.read(start, stop).to(model.device)
                stores[index].write(start, model.forward_block(block, index, hidden))
            model.drop_block(index)
    _at_the_head(model, tokens, stores[-1], seed)
    for index in range(model.n_blocks - 1, 0, -1):
        progress.stage(f"gradients, block {index + 1} of {model.n_blocks}")
        block = model.load_block(index)
        for start, stop in spans:
            hidden = stores[index - 1].read(start, stop).to(model.device)
            gradient = _pulled_back(model, block, index, hidden, stores[index].read(start, stop))
            stores[index - 1].write(start, gradient)
        model.drop_block(index)
    return stores


def observe_outputs(
    model: OpenModel, block: nn.Module, index: int, inputs: Activations, gradients: Activations, batch: int, *, sites: Collection[str]
) -> dict[str, Float[Tensor, "out out"]]:
    """E[g g^T] over tokens at the output of each of `sites` in block `index`; g is pulled back from `gradients` at the block's output.

    What few tokens cannot tell is filled in (see `shrunk`).
    """

    def empty(linear: nn.Linear) -> Tensor:
        return torch.zeros(linear.out_features, linear.out_features, device=model.device)

    def add(total: Tensor, x: Tensor, gradient: Tensor) -> None:
        g = gradient.float()
        total.addmm_(g.T, g)

    found = _gathered(model, block, index, inputs, gradients, batch, sites=sites, empty=empty, add=add)
    return {name: shrunk(total / max(seen, 1), seen) for name, (total, seen) in found.items()}


def observe_guided(
    model: OpenModel, block: nn.Module, index: int, inputs: Activations, gradients: Activations, batch: int, *, sites: Collection[str]
) -> dict[str, Float[Tensor, "n in in"]]:
    """For every even group of rows of each of `sites` in block `index` the second moment of its inputs, each token weighed by the mean
    squared gradient at the group's outputs; `GROUPS` of them, or one per row. (GuidedQuant, Kim et al. 2025, arXiv 2505.07004.)"""

    def empty(linear: nn.Linear) -> Tensor:
        return torch.zeros(min(GROUPS, linear.out_features), *[linear.in_features] * 2, device=model.device)

    def add(totals: Tensor, x: Tensor, gradient: Tensor) -> None:
        x = x.float()
        for total, rows in zip(totals, gradient.float().square().tensor_split(len(totals), dim=1), strict=True):
            total.addmm_((x * rows.mean(1, keepdim=True)).T, x)

    found = _gathered(model, block, index, inputs, gradients, batch, sites=sites, empty=empty, add=add)
    return {name: total / max(seen, 1) for name, (total, seen) in found.items()}


def _gathered(
    model: OpenModel,
    block: nn.Module,
    index: int,
    inputs: Activations,
    gradients: Activations,
    batch: int,
    *,
    sites: Collection[str],
    empty: Callable[[nn.Linear], Tensor],
    add: Callable[[Tensor, Tensor, Tensor], None],
) -> dict[str, tuple[Tensor, int]]:
    """For each of `sites` what `add(sum, x [tok in], g [tok out])` makes of its `empty` sum, and the tokens that it saw."""
    linears = {name: linear for name, linear in model.linears(block, index).items() if name in sites}
    sums, seen = {name: empty(linear) for name, linear in linears.items()}, dict.fromkeys(linears, 0)

    def collect(name: str, x: Tensor, gradient: Tensor) -> None:
        add(sums[name], x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        seen[name] += gradient.numel() // gradient.shape[-1]

    pull_through(model, block, index, inputs, gradients, batch, sites=linears, collect=collect)
    return {name: (sums[name], seen[name]) for name in linears}


def shrunk(second: Float[Tensor, "d d"], tokens: int) -> Float[Tensor, "d d"]:
    """A second moment [d d] of `tokens` samples as if `PRIOR` d more had been seen, alike in all directions and as large on average.

    With as many directions as samples, some look free of cost that are not; rounding would push all its errors there.
    """
    more = PRIOR * second.shape[0]
    even = torch.eye(second.shape[0], device=second.device) * second.diagonal().mean()
    return (tokens * second + more * even) / (tokens + more)


def pull_through(
    model: OpenModel,
    block: nn.Module,
    index: int,
    inputs: Activations,
    gradients: Activations,
    batch: int,
    *,
    sites: Collection[str],
    collect: Callable[[str, Tensor, Tensor], None],
) -> None:
    """`collect(site, x, g)` for every call of each of `sites` while `gradients` at the output of block `index` are pulled back through it.

    x is the site's input, g the gradient at its output. A call whose output does not depend on the block's input is left out.
    """

    def watch(name: str):
        def hook(linear: nn.Module, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: collect(name, args[0].detach(), gradient))

        return hook

    linears = model.linears(block, index)
    hooks = [linears[name].register_forward_hook(watch(name)) for name in sites]
    try:
        for start in range(0, gradients.shape[0], batch):
            stop = min(start + batch, gradients.shape[0])
            _pulled_back(model, block, index, inputs.read(start, stop).to(model.device), gradients.read(start, stop))
    finally:
        for hook in hooks:
            hook.remove()


def _pulled_back(
    model: OpenModel, block: nn.Module, index: int, hidden: Float[Tensor, "b ctx d"], gradient: Float[Tensor, "b ctx d"]
) -> Float[Tensor, "b ctx d"]:
    """The gradient at the input of a block, from that at its output."""
    with torch.enable_grad():
        hidden.requires_grad_(True)
        output = model.forward_block(block, index, hidden)
        return _checked(torch.autograd.grad(output, hidden, gradient.to(output))[0], model.block_name(index))


def _at_the_head(model: OpenModel, tokens: Int[Tensor, "windows ctx"], last: Activations, seed: int) -> None:
    """Replace what leaves the last block by the gradient of log q(sampled tokens) there; logits are wide, so a few tokens at a time."""
    rng = torch.Generator().manual_seed(seed)
    each = max(1, AT_THE_HEAD // tokens.shape[1])
    with model.head() as logits:
        for start in range(0, tokens.shape[0], each):
            stop = min(start + each, tokens.shape[0])
            with torch.enable_grad():
                hidden = last.read(start, stop).to(model.device).requires_grad_(True)
                log_q = logits(tokens[start:stop], hidden).float().log_softmax(-1).flatten(0, 1)
                chosen = log_q.gather(1, drawn(log_q, rng)[:, None]).sum()
                last.write(start, _checked(torch.autograd.grad(chosen, hidden)[0], "the head"))


@torch.no_grad()
def drawn(log_q: Float[Tensor, "n v"], rng: torch.Generator) -> Int[Tensor, "n"]:
    """A draw from each of the distributions `log_q` (Gumbel's way)."""
    noise = torch.rand(log_q.shape, generator=rng).clamp_min(1e-20).to(log_q.device)
    return (log_q - (-noise.log()).log()).argmax(-1)


def _checked(gradient: Tensor, where: str) -> Tensor:
    if not torch.isfinite(gradient).all():
        raise VoroqError(f"the gradients at {where} hold NaN or infinity; quantize with --hessian input, which needs none")
    return gradient
