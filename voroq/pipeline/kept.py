"""A tuning loop with its progress on disk: how much of it goes through the model at a time, and how it goes on after an interruption."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from voroq.packed.files import Entry, write_safetensors
from voroq.tuning.loop import Loop

TOKENS_AT_ONCE = 2048
"""Tokens of one forward and backward; a step adds up as many as its batch needs."""


def windows_per_pass(context: int) -> int:
    """Windows of `context` tokens that go through the model at a time."""
    return max(1, TOKENS_AT_ONCE // context)


def run_kept(loop: Loop, state: Path | None, device: torch.device, progress: Callable[[int, float], None]) -> None:
    """`loop` to its end, from where the file `state` left it, if any; it is saved there at every look."""
    if state is not None and state.is_file():
        loop.restore({name: tensor.to(device) for name, tensor in load_file(state).items()})
    loop.run(checkpoint=None if state is None else lambda loop: _save(loop, state), progress=progress)


def _save(loop: Loop, path: Path) -> None:
    write_safetensors(path, [Entry.of(name, tensor.cpu().contiguous()) for name, tensor in loop.state().items()], {})
