"""Moves of codes along the gradient, the discrete half of PV-tuning (Malinovskii et al. 2024, arXiv 2405.14852).

Each code stands for a few weights; a gradient step on those weights is far too small to reach another word. So the steps are
gathered in a latent matrix, and now and then the codes whose nearest word to it has changed are moved: of those the ones that
gain most, and only a small fraction at a time, because the loss was never asked about all of them together.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.codebook.base import Codebook
from voroq.codebook.table import Table
from voroq.quantized import Band
from voroq.shapes import Codes, Matrix, Vectors

BETAS = (0.9, 0.95)
SEARCHED = 8
"""Vectors for every word of a table, at least, where it pays to know first how far apart its words are."""


class Latent:
    """The weights of one linear [out in], in stored order, where Adam would have taken them."""

    def __init__(self, weight: Matrix) -> None:
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self.size = float(self.weight.square().mean().sqrt())
        self._adam = torch.optim.Adam([self.weight], lr=0.0, betas=BETAS, eps=1e-20, fused=True)

    def step(self, gradient: Matrix, rate: float) -> None:
        """One step of Adam; `rate` is relative to the root mean square the weights began with."""
        self.weight.grad = gradient.float().contiguous()  # the fused step reads memory as it lies, and says nothing
        self._adam.param_groups[0]["lr"] = rate * self.size
        self._adam.step()
        self.weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs."""
        return {"weight": self.weight, **self._adam.state[self.weight]}

    def restore(self, weight: Matrix, remembered: Mapping[str, Tensor]) -> None:
        """Continue from `state`: the weight, and the rest."""
        self.weight.copy_(weight)
        self._adam.state[self.weight] = dict(remembered)


def repick(band: Band, codes: Int[Tensor, "rows cols s"], latent: Float[Tensor, "out c"], limit: float) -> Int[Tensor, "rows cols s"]:
    """`codes` of the band's columns, of which at most the fraction `limit` have moved to the word nearest to `latent`: those that
    come closer to it by most."""
    book, moved, words = band.codebook, codes.reshape(-1, codes.shape[-1]).clone(), band.words(latent)
    places = _unsettled(book, words, moved)
    words, before = words[places], moved[places]
    fresh = book.encode(words).to(codes.dtype)
    gain = ((words - book.decode(before)).square().sum(1) - (words - book.decode(fresh)).square().sum(1)).clamp_min(0)
    if band.scale is not None:
        gain = gain * band.scale.repeat_interleave(codes.shape[1])[places].square()
    chosen = gain.topk(min(int(limit * moved.shape[0]), int((gain > 0).sum()))).indices
    moved[places[chosen]] = fresh[chosen]
    return moved.reshape(codes.shape)


def _unsettled(book: Codebook, words: Vectors, codes: Codes) -> Int[Tensor, "m"]:
    """The places of the vectors whose nearest word may be another than that of `codes`. Few of those in a table, while they drift."""
    if not isinstance(book, Table) or words.shape[0] < SEARCHED * book.centroids.shape[0]:
        return torch.arange(words.shape[0], device=words.device)
    away = (words - book.decode(codes)).square().sum(1)
    return (away >= book.reach()[codes[:, 0].long()]).nonzero()[:, 0]
