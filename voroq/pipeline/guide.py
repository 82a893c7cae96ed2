"""What the blocks' outputs add to the loss while a whole model is tuned: the error of each, weighed by what it costs the answers.

    guide = sum over blocks but the last of  1/2 E[d^T G d]        d = student - original at a block's output [width], G = E[g g^T]

with g the gradient of the log-likelihood of the original's own answers there: to second order each term is the divergence that the error
of that output would cause. Told where it arises, and not only at the logits, the same error makes less noisy gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from voroq.pipeline.capture import first
from voroq.pipeline.gradients import drawn, shrunk

MOMENT_TOKENS = 1 << 14
"""Tokens that the gradients are taken on."""


@contextmanager
def outputs(model: nn.Module, names: Sequence[str], seen: Callable[[str, Float[Tensor, "b ctx d"]], None]) -> Iterator[None]:
    """Inside, `seen` is called with the name and the output of each of the modules `names` whenever it runs."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen(name, first(output))

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def output_moments(
    model: nn.Module, names: Sequence[str], windows: Int[Tensor, "windows ctx"], *, at_once: int, seed: int
) -> dict[str, Float[Tensor, "d d"]]:
    """E[g g^T] over tokens at the outputs of the modules `names`, the first of which the others follow; filled in where tokens are few."""
    count = min(windows.shape[0], max(1, MOMENT_TOKENS // windows.shape[1]))
    rng = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}

    def gather(name: str, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()
        sums[name] = sums[name] + g.T @ g if name in sums else g.T @ g

    def seen(name: str, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        output.register_hook(lambda gradient: gather(name, gradient))

    device = next(model.parameters()).device
    with outputs(model, names, seen), torch.enable_grad():
        for part in windows[:count].split(at_once):
            log_q = model(input_ids=part.to(device), use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
            log_q.gather(1, drawn(log_q, rng)[:, None]).sum().backward()
    tokens = count * windows.shape[1]
    return {name: shrunk(total / tokens, tokens) for name, total in sums.items()}


def output_cost(error: Float[Tensor, "b ctx d"], moment: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
    """1/2 E[d^T G d] over tokens, of errors d at an output where gradients have the second moments G."""
    error = error.float().flatten(0, -2)
    return 0.5 * ((error @ moment) * error).sum(1).mean()


class Guide:
    """The guide of the last calls of `original` and `student`, which must run on the same windows, in that order."""

    def __init__(self, moments: dict[str, Float[Tensor, "d d"]]) -> None:
        self.moments = moments
        self._original: dict[str, Tensor] = {}
        self._student: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, original: nn.Module, student: nn.Module) -> Iterator[None]:
        names = list(self.moments)
        with outputs(original, names, self._original.__setitem__), outputs(student, names, self._student.__setitem__):
            yield

    def __call__(self) -> Float[Tensor, ""]:
        terms = []
        for name, moment in self.moments.items():
            terms.append(output_cost(self._student.pop(name) - self._original.pop(name), moment))
        return torch.stack(terms).sum()
