"""Rows of a table by index, differentiable.

On a CPU the gradient is summed column by column: a loop over numbers, where adding row to row is a call for each, and six times slower
with two threads. In the order of the indices and in float32, so the same bits whatever the number of threads.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rows(table: Float[Tensor, "k dim"], index: Int[Tensor, "n"]) -> Float[Tensor, "n dim"]:
    """`table[index]`."""
    index = index.long()
    if table.device.type != "cpu":
        return table[index]
    return _Rows.apply(table, index) if table.requires_grad else table.index_select(0, index)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, table: Tensor, index: Tensor) -> Tensor:
        context.save_for_backward(index)
        context.count = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = context.saved_tensors
        zero = torch.zeros(context.count, dtype=torch.promote_types(gradient.dtype, torch.float32))
        sums = [zero.index_add(0, index, column.to(zero.dtype)) for column in gradient.unbind(1)]
        return torch.stack(sums, 1).to(gradient.dtype), None
