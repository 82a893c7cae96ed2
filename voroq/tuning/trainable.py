"""A quantized linear that can be trained: tables, scales and shifts are parameters, codes stand still.

The weight is rebuilt at every call, W = restore(join(table[codes])), so the gradient of any loss reaches every centroid through
all the vectors that point to it. Values are trained in float32 and rounded to the stored dtype when the linear is packed.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voroq.quantized import Quantized, reals, with_reals


class Trainable(nn.Module):
    """Stands in for an `nn.Linear`, whose `bias` it takes over. `stored` holds the parameters that `reals` names."""

    def __init__(self, q: Quantized, bias: Float[Tensor, "out"] | None = None) -> None:
        super().__init__()
        self._frame = q
        self.stored = nn.ParameterDict({name.replace(".", "|"): nn.Parameter(t.detach().float().clone()) for name, t in reals(q).items()})
        self.bias = bias

    def quantized(self) -> Quantized:
        """The linear with the parameters as they are now, connected to them."""
        return with_reals(self._frame, {name.replace("|", "."): p for name, p in self.stored.items()})

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.quantized().dequantize().to(x.dtype), self.bias)
