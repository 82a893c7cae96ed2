"""One paper, one file. `METHODS` is the list of names the command line knows; any callable `Method` will do in Python."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from voroq import native
from voroq.methods.base import Method
from voroq.methods.gptq import GPTQ
from voroq.methods.pvq import PVQ
from voroq.methods.rtn import RTN
from voroq.methods.vptq import VPTQ

METHODS: dict[str, type] = {"vptq": VPTQ, "pvq": PVQ, "gptq": GPTQ, "rtn": RTN}


def probing(method: Method) -> Method:
    """`method` at the same rate with the least search, feedback alone: what a linear is worth shows as well, in half the time."""
    if isinstance(method, VPTQ):
        return replace(method, rounds=0, anneal=0)
    return replace(method, sweeps=0, anneal=0) if isinstance(method, PVQ) else method


def is_one_sided(method: Method) -> bool:
    """Whether `method` is known not to look at the gradients at a linear's outputs."""
    return isinstance(method, GPTQ | RTN) or (isinstance(method, PVQ) and not method.two_sided)


def tile_height(method: Method | None) -> int | None:
    """Rows that a vector of `method` spans, 1 where it lies along the input or is not known; None without a method."""
    if isinstance(method, VPTQ):
        return method.vector_length
    if isinstance(method, PVQ) and method.along == "output":
        return method.dim
    return 1 if method else None


def is_guided(method: Method) -> bool:
    """Whether `method` may look at moments of groups of rows: all but those known not to."""
    return not isinstance(method, GPTQ | RTN | PVQ)


def is_slow_two_sided(method: Method, devices: Sequence[torch.device]) -> bool:
    """Whether looking at them takes `method` hours a matrix on `devices`: pyramids, without the library of CPU kernels, which searches
    them in a metric."""
    quick = native.library() is not None and all(device.type == "cpu" for device in devices)
    return isinstance(method, PVQ) and method.two_sided and not quick


__all__ = ["GPTQ", "METHODS", "PVQ", "RTN", "VPTQ", "Method", "is_guided", "is_one_sided", "is_slow_two_sided", "probing", "tile_height"]
