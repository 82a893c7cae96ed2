"""Products of a quantized linear with inputs that are rounded to integers first: what they mean, in floats and in integers."""

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.activations import Activations
from voroq.codebook.pyramid import Pyramids
from voroq.quantized import Quantized


def product(x: Float[Tensor, "*tok in"], q: Quantized, activations: Activations) -> Float[Tensor, "*tok out"]:
    """`x @ w.T` with the inputs in integers, in the dtype of `x`: what a linear with `activations` computes.

    The gradient to `x` is that without rounding.
    """
    stored = q.stored()

    def inner(x: Float[Tensor, "*tok in"]) -> Float[Tensor, "*tok out"]:
        return (x + (activations(x.detach()) - x.detach())) @ stored.T

    return q.transform.linear(x.float(), inner).to(x.dtype)


def integer_product(x: Float[Tensor, "tok in"], q: Quantized, activations: Activations) -> Float[Tensor, "tok out"]:
    """The same by integer arithmetic, for one band of pyramids and one scale a token: 64-bit sums of pulses times inputs for each level,
    the levels' scales, the rows' scales, the token's scale.

    Raises ValueError for other codebooks and for pulses as inputs, whose scales differ within a token.
    """
    book = q.bands[0].codebook
    if len(q.bands) > 1 or not isinstance(book, Pyramids) or activations.kind != "integers":
        raise ValueError(f"a product of integers needs pyramids and one scale a token; got a {type(book).__name__} and {activations.kind}")
    (band,), (codes,) = q.bands, q.codes
    level, y = book.spelled.split(book.spell(codes.reshape(-1, codes.shape[-1])))

    def inner(x: Float[Tensor, "tok in"]) -> Float[Tensor, "tok out"]:
        numbers, scale = activations.integers(x)
        out = torch.zeros(x.shape[0], q.shape[0], dtype=torch.float64, device=x.device)
        for j in range(len(book.pulses)):
            pulses = band.tile.join(torch.where((level == j)[:, None], y, 0).float(), q.shape[0]).long()
            out += book.scales[j].double() * (numbers.long() @ pulses.T)
        rows = band.scale.repeat_interleave(band.tile.rows)[: q.shape[0]]
        return (out * rows * scale[:, :1]).to(x.dtype)

    return q.transform.linear(x, inner)
