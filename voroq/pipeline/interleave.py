"""The channels inside an MLP in an order that suits vectors of weights: large ones beside small ones in every tile.

A tile has one code of fixed width. Channels differ in size by half an octave and more, in gate, up and down alike; a tile of equals
gives its large weights no more bits than a tile of small ones gives its own, while a tile that holds one of each lets the large have
more. So channels are dealt out by rank: aligned tiles of 2, 4, 8 ... rows hold one of each stratum, each stratum at its own place, which
tables learn. Rows of gate and up move, columns of down follow; the function and what is stored stay the same.

Which linears those are is tried, as for rotations: a module whose output stays, with its channels in another order, has such channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_CLOSE = 1e-4
LEAST = 4
"""Strata that must be possible: the largest power of two that divides the number of channels."""


def interleave(block: nn.Module, prefix: str, wanted: Callable[[str], bool]) -> None:
    """Reorder, in place, the channels of every MLP in `block` all of whose linears are `wanted`, by their full names (`prefix` is the
    block's own). What the block computes does not change but for the order of sums."""
    for parent, module in block.named_modules():
        for inner in _inside(module):
            names = [".".join(part for part in (prefix, parent, name) if part) for name in inner.names]
            if all(map(wanted, names)) and inner.is_free(module):
                inner.reorder(strata(inner.sizes()))


def strata(sizes: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """An order of channels of these sizes: every aligned run of 2^m, while that divides n, has one of each 2^m-quantile, at the place
    whose bits are the quantile's reversed."""
    n = sizes.shape[0]
    bits = (n & -n).bit_length() - 1
    ranked = sizes.argsort(descending=True, stable=True)
    if 1 << bits < LEAST:
        return torch.arange(n)
    places = torch.arange(1 << bits)
    reversed_ = sum((places >> bit & 1) << (bits - 1 - bit) for bit in range(bits))
    return ranked[(reversed_ * (n >> bits) + torch.arange(n >> bits)[:, None]).flatten()]


@dataclass(frozen=True)
class Inner:
    """Linears of one module: `ups` make channels, several at once where they are fused, `down` reads them."""

    names: tuple[str, ...]
    ups: tuple[nn.Linear, ...]
    down: nn.Linear

    def sizes(self) -> Float[Tensor, "n"]:
        """Logarithm of the product of a channel's norms in all linears."""
        count = self.down.in_features
        rows = [part.norm(dim=1) for up in self.ups for part in up.weight.detach().double().cpu().split(count)]
        return sum(norm.log() for norm in (*rows, self.down.weight.detach().double().cpu().norm(dim=0)))

    def reorder(self, order: Int[Tensor, "n"]) -> None:
        for up in self.ups:
            parts = torch.arange(0, up.out_features, self.down.in_features)[:, None]
            up.weight.data = up.weight.data[(parts + order).flatten().to(up.weight.device)]
        self.down.weight.data = self.down.weight.data[:, order.to(self.down.weight.device)]

    @torch.no_grad()
    def is_free(self, module: nn.Module) -> bool:
        """Whether `module` computes the same with its channels in another order."""
        rng = torch.Generator().manual_seed(0)
        order = torch.randperm(self.down.in_features, generator=rng)
        x = torch.randn(1, 4, self.ups[0].in_features, generator=rng).to(self.down.weight)
        try:
            before = module(x)
        except Exception:  # a module of another kind fails in its own way on a lone tensor
            return False
        self.reorder(order)
        after = module(x)
        self.reorder(order.argsort())
        return isinstance(before, Tensor) and bool((after - before).norm() <= _CLOSE * before.norm())


def _inside(module: nn.Module) -> Iterator[Inner]:
    """What may be the linears of an MLP, by shape, among the children of `module`."""
    linears = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    for name, down in linears.items():
        ups = {
            other: up
            for other, up in linears.items()
            if other != name and up.in_features == down.out_features and up.out_features % down.in_features == 0 and up.bias is None
        }
        if ups and len(ups) == len(linears) - 1:
            yield Inner((name, *ups), tuple(ups.values()), down)
