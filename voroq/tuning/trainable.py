"""A quantized linear that can be trained: tables, scales and shifts are parameters, codes stand still unless moved.

The weight is rebuilt at every call, W = restore(join(table[codes])), so the gradient of any loss reaches every centroid through
all the vectors that point to it. (Pyramids are spelled out once, since decoding numbers takes long.) Values are trained in float32 and
rounded to the stored dtype when the linear is packed.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voroq.codebook.pyramid import Pyramids
from voroq.quantized import Quantized, reals, with_reals


def spelled(q: Quantized) -> Quantized:
    """`q` with the numbers of pyramids spelled out as pulses: the same weights, and the same reals by the same names."""
    bands, codes = list(q.bands), list(q.codes)
    for i, band in enumerate(q.bands):
        if isinstance(band.codebook, Pyramids):
            codes[i] = band.codebook.spell(codes[i].flatten(0, 1)).unflatten(0, codes[i].shape[:2])
            bands[i] = replace(band, codebook=band.codebook.spelled)
    return replace(q, bands=tuple(bands), codes=tuple(codes))


class Trainable(nn.Module):
    """Stands in for an `nn.Linear`, whose `bias` it takes over. `stored` holds the parameters that `reals` names.

    With `watch`, `gradient` sums the gradients of the weight in stored order (see `moves`) until it is set to None.
    """

    def __init__(self, q: Quantized, bias: Float[Tensor, "out"] | None = None) -> None:
        super().__init__()
        self._frame, self._spelled = q, spelled(q)
        self.stored = nn.ParameterDict({name.replace(".", "|"): nn.Parameter(t.detach().float().clone()) for name, t in reals(q).items()})
        self.bias = bias
        self.watch = False
        self.gradient: Tensor | None = None

    @property
    def codes(self) -> tuple[Tensor, ...]:
        return self._frame.codes

    @codes.setter
    def codes(self, codes: tuple[Tensor, ...]) -> None:
        self._frame = replace(self._frame, codes=codes)
        self._spelled = spelled(self._frame)

    def quantized(self) -> Quantized:
        """The linear with the parameters as they are now, connected to them."""
        return with_reals(self._frame, self._reals())

    def _reals(self) -> dict[str, Tensor]:
        return {name.replace("|", "."): p for name, p in self.stored.items()}

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        values, dtype = self._reals(), product_dtype(x)
        if all(name.endswith("/centroids") for name in values):  # nothing is added or multiplied: rounded first, they are rounded alike
            values = {name: p.to(dtype) for name, p in values.items()}
        q = with_reals(self._spelled, values)
        stored = q.stored()
        if self.watch and stored.requires_grad:
            stored.register_hook(self._collect)
        return F.linear(x, q.transform.restore(stored).to(dtype), self.bias)

    def _collect(self, gradient: Tensor) -> None:
        gradient = gradient.float()
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product with `x` is computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
