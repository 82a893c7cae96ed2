"""Tuning with a model: block by block towards the original block's output, or as a whole towards the original's logits.

    block    |student(x) - block(x)|^2 / |block(x)|^2          over tables, scales and shifts; two blocks in memory
    model    KL( softmax(original logits) || softmax(quantized logits) )    over those, norms and biases; two models in memory
             (and what the blocks' outputs say of it: `guide.py`)

The loop itself is `tuning/loop.py`. (The paper's two last stages, whose code was never released.)
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.pipeline.activations import Activations
from voroq.pipeline.embedding import tune_embedding
from voroq.pipeline.guide import Guide, output_moments
from voroq.pipeline.kept import TOKENS_AT_ONCE, run_kept, windows_per_pass
from voroq.pipeline.memory import free_memory
from voroq.pipeline.model import OpenModel
from voroq.pipeline.progress import Progress
from voroq.quantized import Quantized
from voroq.tuning.loop import Loop, Tuning, held_out
from voroq.tuning.losses import divergence
from voroq.tuning.trainable import Trainable

PER_WEIGHT, PER_LOGIT = 36, 24
"""Bytes: of a quantized weight its value, gradient, latent and that one's moments, code, and copies in the making; of a logit."""


def check_head(model: OpenModel) -> None:
    """Raise VoroqError where `model` has no logits to be tuned by."""
    if model.skeleton.get_output_embeddings() is None:
        raise VoroqError(f"{model.source.name} has no language model head, so there are no logits to tune towards; leave tuning out")


def check_memory(model: OpenModel, teacher: OpenModel | None = None) -> None:
    """Raise VoroqError where `model` is too large to be tuned as a whole on its device towards `teacher` (itself, if None), before any
    work is lost."""
    needed, free = tuning_bytes(model, teacher or model), free_memory(model.device)
    if free is not None and needed > free:
        raise VoroqError(
            f"tuning the whole model takes about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free on {model.device}; "
            "leave tuning out (--effort fast holds one block at a time), or take a machine with more"
        )


def tuning_bytes(model: OpenModel, teacher: OpenModel) -> int:
    """About the memory that `tune` takes: a float32 teacher, per quantized weight what makes and moves it, and logits of one pass."""
    weights = sum(p.numel() for p in teacher.skeleton.parameters())
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    return 4 * weights + PER_WEIGHT * model.linear_weights + PER_LOGIT * TOKENS_AT_ONCE * vocabulary


@dataclass(frozen=True)
class Tuned:
    """What came of it: the sites and the other parameters as tuned, and the mean loss on held-out windows before and after."""

    sites: dict[str, Quantized] = field(repr=False)
    others: dict[str, Tensor] = field(repr=False)
    before: float
    after: float
    steps: int


def tune(
    original: nn.Module,
    student: nn.Module,
    windows: Int[Tensor, "windows ctx"],
    tuning: Tuning,
    *,
    free: frozenset[str],
    blocks: Sequence[str],
    seed: int,
    state: Path | None,
    progress: Progress,
) -> Tuned:
    """Tune `student`, whose quantized linears are `Trainable`s, towards `original`, and say what became of its parameters.

    Besides what the `Trainable`s store, the one-dimensional parameters among `free` are tuned, and head, embedding and the blocks' other
    linears where they have a rate. `blocks` are the names of the models' blocks in order, whose outputs guide where `tuning` says so.
    Steps of the embedding alone come first. `state` is the file the progress is saved to and continued from, if any.

    Raises VoroqError where the loss stops being finite.
    """
    device = next(original.parameters()).device
    student.requires_grad_(False)
    sites = _trainables(student)
    own = tuple(f"{name}.stored." for name in sites)
    norms = {name: p for name, p in student.named_parameters() if p.dim() == 1 and name in free and not name.startswith(own)}
    plain = {name: (p, tuning.norm_rate) for name, p in norms.items()} | _matrices(student, free, blocks, tuning)

    def loss(rows: Int[Tensor, "w"]) -> Tensor:
        tokens = windows[rows].to(device)
        with tuning.autocast(device):
            with torch.no_grad():
                target = original(input_ids=tokens, use_cache=False).logits
            return divergence(target, student(input_ids=tokens, use_cache=False).logits)

    at_once = windows_per_pass(windows.shape[1])
    moments = {}
    if (tuning.guide or tuning.embedding_steps) and len(blocks) > 1:
        progress.stage("gradients at the blocks' outputs")
        moments = output_moments(original, blocks[:-1], windows, at_once=at_once, seed=seed)
    embedding = student.get_input_embeddings().weight
    if tuning.embedding_steps and moments and any(p is embedding for p, _ in plain.values()):
        kept = None if state is None else state.with_name(f"embedding-{state.name}")
        name = blocks[0]
        tune_embedding(original, student, windows, name, moments[name], tuning, seed=seed, state=kept, progress=progress)
    guide = Guide(moments) if tuning.guide and moments else None

    def guided(rows: Int[Tensor, "w"]) -> Tensor:
        with guide.watching(original, student):
            return loss(rows) + tuning.guide * guide()

    split = held_out(windows.shape[0], seed)
    loop = Loop(sites, plain, loss, split, tuning, at_once=at_once, seed=seed, guided=guided if guide else None)
    run_kept(loop, state, device, lambda step, loss: progress.stage(f"tuning, step {step} of {tuning.steps}, loss {loss:.4f}"))
    return Tuned(loop.quantized(), {name: p.detach() for name, (p, _) in plain.items()}, loop.first, loop.best, loop.step)


def tune_block(
    model: OpenModel, block: nn.Module, index: int, sites: Mapping[str, Quantized], inputs: Activations, tuning: Tuning, *, seed: int
) -> Tuned:
    """Tune the quantized `sites` of loaded block `index` so that it answers `inputs` as `block` does; no other parameter changes.

    The first `tuning.samples` windows are used. Needs `OpenModel.capture` with the batches of `block_batches`. Raises VoroqError
    where the loss stops being finite.
    """
    prefix = f"{model.block_name(index)}."
    student = student_of(block, {name.removeprefix(prefix): q for name, q in sites.items()}, lambda: copy.deepcopy(block))
    student.requires_grad_(False)

    def loss(rows: Int[Tensor, "w"]) -> Tensor:
        hidden = torch.cat([inputs.read(row, row + 1) for row in rows.tolist()]).to(model.device)
        with tuning.autocast(model.device):
            with torch.no_grad():
                target = model.forward_block(block, index, hidden).float()
            return (model.forward_block(student, index, hidden).float() - target).square().sum() / target.square().sum()

    windows = held_out(min(tuning.samples, inputs.shape[0]), seed)
    loop = Loop(_trainables(student), {}, loss, windows, tuning, at_once=windows_per_pass(inputs.shape[1]), seed=seed)
    loop.run()
    return Tuned({prefix + name: q for name, q in loop.quantized().items()}, {}, loop.first, loop.best, loop.step)


def block_batches(tuning: Tuning, shape: tuple[int, ...], seed: int) -> set[int]:
    """The numbers of windows that `tune_block` runs a block on, for calibration windows of `shape` (windows, context)."""
    train, held = held_out(min(tuning.samples, shape[0]), seed)
    parts = [min(tuning.batch, train.shape[0]), held.shape[0]]
    return {len(part) for count in parts for part in torch.arange(count).split(windows_per_pass(shape[1]))}


def student_of(original: nn.Module, sites: Mapping[str, Quantized], whole: Callable[[], nn.Module]) -> nn.Module:
    """A second model with `sites` as `Trainable`s; it shares with `original` whatever does not train."""
    student = whole()
    for name, q in sites.items():
        linear = student.get_submodule(name)
        student.set_submodule(name, Trainable(q, linear.bias))
    theirs: dict[str, Any] = dict(original.named_parameters(remove_duplicate=False))
    for name, p in student.named_parameters(remove_duplicate=False):
        if p.dim() > 1 and name in theirs:
            p.data = theirs[name].data
    return student


def _matrices(
    student: nn.Module, free: frozenset[str], blocks: Sequence[str], tuning: Tuning
) -> dict[str, tuple[nn.Parameter, float]]:
    """The matrices of the head, of the embedding and of the blocks' linears with their rates, those that have one and are `free`; head and
    embedding unless they are the same matrix. Copies, since students share what does not train."""
    head, embedding = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    rates = {} if head is embedding else {id(head): tuning.head_rate, id(embedding): tuning.embedding_rate}
    linears = [linear for name in blocks for linear in student.get_submodule(name).modules() if isinstance(linear, nn.Linear)]
    rates |= {id(linear.weight): tuning.weight_rate for linear in linears}
    found = {name: (p, rates[id(p)]) for name, p in student.named_parameters() if name in free and rates.get(id(p))}
    for p, _ in found.values():
        p.data = p.data.clone()
    return found


def _trainables(student: nn.Module) -> dict[str, Trainable]:
    return {name: module for name, module in student.named_modules() if isinstance(module, Trainable)}
