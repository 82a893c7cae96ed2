"""The alphabet of shapes.

Public tensor parameters are annotated with these axis names (jaxtyping: `Float[Tensor, "out in"]`):

    out in   rows and columns of a linear's weight; y = x @ w.T
    tok      tokens, the rows of a batch of layer inputs
    n dim    n vectors of dim weights each
    k        words of a table
    s        streams of one code (main, residual, ...)
    rows cols  a grid of tiles: `rows` down the output, `cols` along the input
"""

from jaxtyping import Float, Int
from torch import Tensor

Matrix = Float[Tensor, "out in"]
Square = Float[Tensor, "in in"]
Vectors = Float[Tensor, "n dim"]
Codes = Int[Tensor, "n s"]
