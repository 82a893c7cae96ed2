"""What a rotation does to one weight: the arithmetic, in float64.

The stream's rows h become h q, and what is normed keeps its length, so with x = norm(h) * gain and q^T q = I:

    embedding   e          ->  e q
    reader      w x        ->  (w diag(gain)) q       acts on norm(h) q; the gain becomes 1
    writer      w, b       ->  q^T w, q^T b
    values      w, b       ->  r^T w, r^T b           per head, r of the head's dimension
    output      w          ->  w r                    per head
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.numerics.hadamard import rotate
from voroq.shapes import Matrix

PART = 1 << 22
"""Numbers of one weight that are held in float64 at a time, where rows or columns are independent of each other."""


@dataclass(frozen=True)
class Fold:
    """All that happens to one linear or embedding; every field is a gain or the signs of a rotation, absent where None.

    gain        of the norm it reads [in]
    reads       the stream's rotation, on its inputs
    writes      the stream's rotation, on its outputs
    averages    the heads' rotation, on its inputs: it reads averages of values
    values      the heads' rotation, on the outputs `rows` (start, stop): they are values
    """

    gain: Float[Tensor, "in"] | None = None
    reads: Tensor | None = None
    writes: Tensor | None = None
    averages: Tensor | None = None
    values: Tensor | None = None
    rows: tuple[int, int] = (0, 0)

    def weight(self, w: Matrix, dtype: torch.dtype) -> Matrix:
        """The new weight, in `dtype`; computed part by part in float64."""
        out = torch.empty(w.shape, dtype=dtype)
        for rows, columns in self._parts(w.shape):
            out[rows, columns] = self._outputs(self._inputs(w[rows, columns].double())).to(dtype)
        return out

    def bias(self, b: Float[Tensor, "out"], dtype: torch.dtype) -> Float[Tensor, "out"]:
        """The new bias, in `dtype`."""
        return self._outputs(b.double()[:, None])[:, 0].to(dtype)

    def _inputs(self, w: Matrix) -> Matrix:
        if self.gain is not None:
            w = w * self.gain
        if self.reads is not None:
            w = rotate(w, self.reads)
        return w if self.averages is None else _by_head(w, self.averages)

    def _outputs(self, w: Matrix) -> Matrix:
        if self.values is not None:
            start, stop = self.rows
            w = torch.cat((w[:start], _by_head(w[start:stop].T, self.values).T, w[stop:]))
        return w if self.writes is None else rotate(w.T, self.writes).T

    def _parts(self, shape: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of parts that do not need each other."""
        rows, columns = shape
        everything = slice(None)
        if self.values is None and self.writes is None:
            step = max(1, PART // columns)
            yield from ((slice(start, start + step), everything) for start in range(0, rows, step))
        elif self.gain is None and self.reads is None:
            head = 1 if self.averages is None else len(self.averages)
            step = head * max(1, PART // rows // head)
            yield from ((everything, slice(start, start + step)) for start in range(0, columns, step))
        else:
            yield everything, everything


def _by_head(w: Matrix, signs: Tensor) -> Matrix:
    return rotate(w.unflatten(1, (-1, len(signs))), signs).flatten(1)
