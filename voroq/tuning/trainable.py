"""A quantized linear that can be trained: tables, scales and shifts are parameters, codes stand still unless moved.

The weight is rebuilt at every call, W = restore(join(table[codes])), so the gradient of any loss reaches every centroid through
all the vectors that point to it. Values are trained in float32 and rounded to the stored dtype when the linear is packed.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voroq.quantized import Quantized, reals, with_reals


class Trainable(nn.Module):
    """Stands in for an `nn.Linear`, whose `bias` it takes over. `stored` holds the parameters that `reals` names.

    With `watch`, `gradient` sums the gradients of the weight in stored order (see `moves`) until it is set to None.
    """

    def __init__(self, q: Quantized, bias: Float[Tensor, "out"] | None = None) -> None:
        super().__init__()
        self._frame = q
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

    def quantized(self) -> Quantized:
        """The linear with the parameters as they are now, connected to them."""
        return with_reals(self._frame, {name.replace("|", "."): p for name, p in self.stored.items()})

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        q = self.quantized()
        stored = q.stored()
        if self.watch and stored.requires_grad:
            stored.register_hook(self._collect)
        return F.linear(x, q.transform.restore(stored).to(x.dtype), self.bias)

    def _collect(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
