"""Logits of a model that reads its past from a quantized cache.

A window goes through the model a few tokens at a time. Those of a call see each other, and the recent ones, as they are; everything
older they see through its codes, as in generation.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.integrations.cache import PyramidCache
from voroq.integrations.compat import cache_argument


@dataclass(frozen=True)
class Cached:
    """A way through the model for `evaluate`: keys and values in `bits` bits but for the `recent` newest, `chunk` tokens a call."""

    bits: float
    recent: int = 32
    chunk: int = 16

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise VoroqError(f"chunks of {self.chunk} tokens get nowhere; give 1 or more")

    def __call__(self, model: nn.Module, rows: Int[Tensor, "w ctx"]) -> Float[Tensor, "w ctx v"]:
        cache, parts = PyramidCache(model.config, self.bits, recent=self.recent), []
        for tokens in rows.to(model.device).split(self.chunk, dim=1):
            parts.append(model(input_ids=tokens, use_cache=True, **cache_argument(model.forward, cache)).logits)
        return torch.cat(parts, dim=1)
