"""Moves of codes along the gradient, the discrete half of PV-tuning (Malinovskii et al. 2024, arXiv 2405.14852).

Each code stands for a few weights; a gradient step on those weights is far too small to reach another word. So the steps are
gathered in a latent matrix, and now and then the codes whose nearest word to it has changed are moved: of those the ones that
gain most, and only a small fraction at a time, because the loss was never asked about all of them together.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.quantized import Band
from voroq.shapes import Matrix

BETAS = (0.9, 0.95)


class Latent:
    """The weights of one linear [out in], in stored order, where Adam would have taken them."""

    def __init__(self, weight: Matrix) -> None:
        self.weight = weight.detach().clone()
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.size = float(self.weight.square().mean().sqrt())

    def step(self, gradient: Matrix, rate: float, number: int) -> None:
        """Adam's step `number` (from 1); `rate` is relative to the root mean square the weights began with."""
        a, b = BETAS
        self.first.mul_(a).add_(gradient, alpha=1 - a)
        self.second.mul_(b).addcmul_(gradient, gradient, value=1 - b)
        mean, spread = self.first / (1 - a**number), (self.second / (1 - b**number)).sqrt()
        self.weight -= rate * self.size * mean / spread.clamp_min(1e-20)


def repick(band: Band, codes: Int[Tensor, "rows cols s"], latent: Float[Tensor, "out c"], limit: float) -> Int[Tensor, "rows cols s"]:
    """`codes` of the band's columns, of which at most the fraction `limit` have moved to the word nearest to `latent`: those that
    come closer to it by most."""
    out = latent.shape[0]

    def distance(chosen: Tensor) -> Float[Tensor, "n"]:
        return band.tile.cut(latent - band.decode(chosen, out)).square().sum(1)

    fresh = band.encode(latent).to(codes.dtype)
    gain = (distance(codes) - distance(fresh)).clamp_min(0)
    count = min(int(limit * gain.numel()), int((gain > 0).sum()))
    chosen = gain.topk(count).indices
    moved = codes.reshape(-1, codes.shape[-1]).clone()
    moved[chosen] = fresh.reshape(moved.shape)[chosen]
    return moved.reshape(codes.shape)
