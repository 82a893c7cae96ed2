"""How fast models read and write: tokens per second, bytes of weights, and how near decoding comes to what the memory allows.

Each step of decoding reads all weights once, whatever the batch, so it can take no less than bytes / bandwidth. The bandwidth is
measured by copying (bytes read and written per second). Several models are measured in turns and the best time of each counts, so that
other work on the machine hits all of them alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import nn

from voroq.errors import VoroqError
from voroq.evaluation.generation import BEST_TOKEN
from voroq.evaluation.models import max_positions
from voroq.pipeline.memory import peak_memory

COPIED = 1 << 28
"""Bytes that are copied to measure the bandwidth; more than any cache holds."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model at one batch; `of_limit` is the share of the bandwidth that decoding uses for weights. None where
    reading took longer than reading and writing: too much else runs on the machine."""

    model: str
    batch: int
    prefill: float
    decode: float | None
    of_limit: float | None


@dataclass(frozen=True)
class SpeedReport:
    """`weights` are bytes of every model's tensors; `bandwidth` bytes per second; `peak` what this process took at most (pipeline/memory),
    all models together."""

    speeds: list[Speed]
    weights: dict[str, int]
    bandwidth: float
    peak: dict[str, int | None]
    threads: int
    device: str


def measure(
    models: dict[str, nn.Module], *, batches: tuple[int, ...] = (1, 4, 16), prompt: int = 128, new: int = 32, repeats: int = 3
) -> SpeedReport:
    """Reading `prompt` random tokens and writing `new` after the first, for every model and batch. Raises VoroqError beyond a model's
    positions."""
    for name, model in models.items():
        limit = max_positions(model)
        if limit is not None and prompt + new + 1 > limit:
            asked = f"a prompt of {prompt} and {new + 1} new tokens"
            raise VoroqError(f"{asked} exceed the {limit} positions of {name}: give a shorter --prompt or fewer --new")
    device = next(iter(models.values())).device
    bandwidth = copy_bandwidth(device, repeats)
    best: dict[tuple[str, int], list[float]] = {(name, batch): [inf, inf] for batch in batches for name in models}
    for model in models.values():
        _write(model, 1, prompt, 2)  # what happens only once
    for _ in range(repeats):
        for (name, batch), times in best.items():
            for place, count in enumerate((1, new + 1)):
                times[place] = min(times[place], _write(models[name], batch, prompt, count))
    weights = {name: weight_bytes(model) for name, model in models.items()}
    read = {name: weight_bytes(model, without=_looked_up(model)) for name, model in models.items()}
    speeds = []
    for (name, batch), (first, whole) in best.items():
        step = (whole - first) / new
        decode = (batch / step, read[name] / step / bandwidth) if step > 0 else (None, None)
        speeds.append(Speed(name, batch, batch * prompt / first, *decode))
    return SpeedReport(speeds, weights, bandwidth, peak_memory(), torch.get_num_threads(), str(device))


def copy_bandwidth(device: torch.device, repeats: int = 3) -> float:
    """Bytes read and written per second by a copy in the device's memory."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / min(_timed(lambda: target.copy_(source), device) for _ in range(max(2, repeats)))


def weight_bytes(model: nn.Module, without: nn.Module | None = None) -> int:
    """Of all parameters, those of `without` excepted."""
    left_out = {id(p) for p in without.parameters()} if without is not None else set()
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in left_out)


def _looked_up(model: nn.Module) -> nn.Module | None:
    """The embedding of which a step reads single rows; None where the head multiplies with it too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    return None if tied else embedding


def _write(model: nn.Module, batch: int, prompt: int, count: int) -> float:
    """Seconds in which `generate` reads the prompts and writes `count` tokens for each."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    settings = {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0, **BEST_TOKEN}
    return _timed(lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings), model.device)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
