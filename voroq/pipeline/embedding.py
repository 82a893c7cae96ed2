"""What quantizing the first block does to a token, wherever it stands, its row of the embedding can undo.

    minimise   1/2 E[d^T G d]  over the embedding        d = student - original at the first block's output, G = E[g g^T] there

A block's error depends on what comes before the token, but in the first block mostly on the token itself. A step of whole-model
tuning sees a token a few times at most and moves its row by noise; here only the first block runs, so steps are cheap and see more.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from voroq.pipeline.capture import Captured
from voroq.pipeline.guide import output_cost, outputs
from voroq.pipeline.kept import run_kept, windows_per_pass
from voroq.pipeline.progress import Progress
from voroq.tuning.loop import Loop, Tuning, held_out

BATCHES = 4
"""Batches of the tuning that a step takes."""
RATE = 0.01
"""Largest step, relative to the embedding's root mean square."""


def tune_embedding(
    original: nn.Module,
    student: nn.Module,
    windows: Int[Tensor, "windows ctx"],
    name: str,
    moment: Float[Tensor, "d d"],
    tuning: Tuning,
    *,
    seed: int,
    state: Path | None,
    progress: Progress,
) -> None:
    """`tuning.embedding_steps` of `student`'s embedding, a matrix of its own, towards what the first block `name` of `original` answers;
    `moment` is G. `state` is the file the progress is saved to and continued from, if any."""
    embedding = student.get_input_embeddings().weight
    device = embedding.device

    def loss(rows: Int[Tensor, "w"]) -> Tensor:
        tokens = windows[rows].to(device)
        with tuning.autocast(device):
            with torch.no_grad():
                target = answer(original, name, tokens)
            made = answer(student, name, tokens)
        return output_cost(made - target, moment)

    steps = tuning.embedding_steps
    alone = replace(tuning, steps=steps, batch=BATCHES * tuning.batch, moves=0.0)
    at_once, split = windows_per_pass(windows.shape[1]), held_out(windows.shape[0], seed)
    loop = Loop({}, {"embedding": (embedding, RATE)}, loss, split, alone, at_once=at_once, seed=seed)
    run_kept(loop, state, device, lambda step, loss: progress.stage(f"tuning the embedding, step {step} of {steps}, loss {loss:.5f}"))
    embedding.requires_grad_(False)


def answer(model: nn.Module, name: str, tokens: Int[Tensor, "b ctx"]) -> Float[Tensor, "b ctx d"]:
    """What the block `name` of `model` makes of `tokens`; nothing behind it runs."""
    found: list[Tensor] = []

    def stop(name: str, output: Tensor) -> None:
        found.append(output)
        raise Captured

    with suppress(Captured), outputs(model, [name], stop):
        model(input_ids=tokens, use_cache=False)
    return found[0]
