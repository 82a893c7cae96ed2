"""Inputs of a linear as integers, made when they come: x = scale * n, so that a product with integer weights is a product of integers.

    integers    n = round(x / scale), scale = max |x| / (2^(b-1) - 1) of every token
    pulses      n in P(64, k): the nearest integers whose magnitudes sum to k, with the scale <x, n> / <n, n> that fits them best; k is the
                largest with V(64, k) <= 2^(64 b), so that b bits a number would name them (van der Ouderaa et al. 2024, arXiv 2410.16926)

Both act on what the codes of the weight meet: the inputs after the linear's own transform, a rotation if it has one. Pulses lose less, but
single ones may exceed b bits: the b bits exist only where numbers are stored. For products in 8 bits take integers.

This is the meaning; nothing here is fast. Products with them are in `products.py`.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.errors import VoroqError
from voroq.numerics.pyramid import counts, project

KINDS = ("integers", "pulses")
GROUP = 64
"""Numbers of a token that share a sum and a scale, for pulses; the last group may be smaller."""


@dataclass(frozen=True)
class Activations:
    """How inputs become integers: 4 to 8 bits, `kind` integers or pulses. Raises VoroqError for others."""

    bits: int
    kind: str = "integers"

    def __post_init__(self) -> None:
        if not 4 <= self.bits <= 8:
            raise VoroqError(f"activations in {self.bits} bits are not supported; give 4 to 8")
        if self.kind not in KINDS:
            raise VoroqError(f"activations as {self.kind!r} are unknown; choose one of {', '.join(KINDS)}")

    def integers(self, x: Float[Tensor, "tok in"]) -> tuple[Float[Tensor, "tok in"], Float[Tensor, "tok in"]]:
        """The integers (as floats) of `x`, and the scale of each."""
        if self.kind == "integers":
            scale = (x.abs().amax(1, keepdim=True) / (2 ** (self.bits - 1) - 1)).clamp_min(torch.finfo(x.dtype).tiny)
            return (x / scale).round(), scale.expand_as(x)
        parts = [_pulses(part, self.bits) for part in x.split(GROUP, dim=1)]
        numbers, scales = zip(*parts, strict=True)
        return torch.cat(numbers, dim=1), torch.cat(scales, dim=1)

    def __call__(self, x: Float[Tensor, "*tok in"]) -> Float[Tensor, "*tok in"]:
        """`x` as its integers say it, in its own dtype."""
        numbers, scale = self.integers(x.reshape(-1, x.shape[-1]).float())
        return (numbers * scale).reshape(x.shape).to(x.dtype)

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "kind": self.kind}


def _pulses(x: Float[Tensor, "tok n"], bits: int) -> tuple[Float[Tensor, "tok n"], Float[Tensor, "tok n"]]:
    pulses = most_pulses(x.shape[1], bits)
    total = x.abs().sum(1, keepdim=True)
    unit = torch.where(total > 0, x / total.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
    n = project(unit * pulses, torch.full((x.shape[0],), pulses, device=x.device))
    return n, ((x * n).sum(1, keepdim=True) / n.square().sum(1, keepdim=True)).expand_as(x)


@lru_cache(maxsize=32)
def most_pulses(dim: int, bits: int) -> int:
    """The largest k with V(dim, k) <= 2^(dim bits)."""
    row = counts(dim, dim * 2**bits // 4)[dim]  # V(dim, k) is near (2 e k / dim)^dim: the answer is below dim 2^bits / 5
    return max(1, bisect_right(row, 1 << dim * bits) - 1)
