"""The channels inside an MLP in an order that suits vectors of weights: large ones beside small ones in every tile.

A tile has one code of fixed width. Channels differ in size by half an octave and more, in gate, up and down alike, and so does what an
error in them costs; a tile of equals gives its large weights no more bits than a tile of small ones gives its own, while a tile that
holds one of each lets the large have more. So channels are dealt out by rank: every tile of h rows holds one of each of h strata, each
stratum at its own place, which tables learn. Rows of gate and up move, columns of down follow; the function and what is stored stay.

Which linears those are is tried, as for rotations: a module whose output stays, with its channels in another order, has such channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_CLOSE = 1e-4


def interleave(block: nn.Module, prefix: str, height: Callable[[str], int | None]) -> list[tuple[str, ...]]:
    """Reorder, in place, the channels of every MLP in `block` whose linears all have a `height`: how many rows their tiles span, None
    for one that must stay as it is. Names are full ones (`prefix` is the block's own). What the block computes does not change but for
    the order of sums. Returns the names of the linears whose rows moved, together for every MLP."""
    moved = []
    for module, inner in inner_of(block, prefix):
        heights = [height(name) for name in inner.names]
        if None not in heights and max(heights[1:]) > 1 and inner.is_free(module):
            inner.reorder(strata(inner.sizes(), heights[1:]))
            moved.append(inner.names[1:])
    return moved


def inner_of(block: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, "Inner"]]:
    """What may be the MLPs of `block`, whose own name is `prefix`, by shape; each with the module that has its linears as children."""
    for parent, module in block.named_modules():
        path = [part for part in (prefix, parent) if part]
        for inner in _inside(module):
            yield module, replace(inner, names=tuple(".".join((*path, name)) for name in inner.names))


def strata(sizes: Float[Tensor, "n"], heights: Sequence[int]) -> Int[Tensor, "n"]:
    """An order of channels of these sizes for tiles of `heights` rows: each place of a tile has a stratum of its own, the largest first.

    Where heights differ a channel has a place in each kind of tile, and the ranks go by the mean of the places.
    """
    channels = torch.arange(sizes.shape[0])
    place = sum((channels % height).double() / height for height in heights)
    order = torch.empty_like(channels)
    order[place.argsort(stable=True)] = sizes.argsort(descending=True, stable=True).cpu()
    return order


@dataclass(frozen=True)
class Inner:
    """Linears of one module: `ups` make channels, several at once where they are fused, `down` reads them. `names`: down's first."""

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
