"""A randomised Hadamard rotation of the inputs, and of the outputs if wanted: w' = q_out^T w q_in, h' = q_in^T h q_in.

With it no single input or output carries an error alone ("incoherence": QuIP#, Tseng et al. 2024, arXiv 2402.04396). What must be
stored is one sign per input (and output), an integer and no subject to tuning; multiplying costs one fast transform per side.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from voroq.numerics.hadamard import random_signs, rotate, unrotate
from voroq.shapes import Matrix, Square
from voroq.transform.base import Inner


@dataclass(frozen=True)
class Hadamard:
    """`input` has a sign for every column; `output` one for every row, or is None: rows stay as they are."""

    input: Int[Tensor, "in"]
    output: Int[Tensor, "out"] | None = None

    @staticmethod
    def random(shape: tuple[int, int], rng: torch.Generator, *, both: bool = False) -> "Hadamard":
        """Random signs for a weight of `shape` (out, in): for its inputs, or for `both` sides."""
        signs = random_signs(shape[1], rng).to(torch.int8)
        return Hadamard(signs, random_signs(shape[0], rng).to(torch.int8) if both else None)

    def weight(self, w: Matrix) -> Matrix:
        w = rotate(w, self.input)
        return w if self.output is None else rotate(w.T, self.output).T

    def hessian(self, h: Square) -> Square:
        return rotate(rotate(h, self.input).T, self.input).T

    def outputs(self, g: Float[Tensor, "out out"]) -> Float[Tensor, "out out"]:
        """`g` such that tr(G E H E^T) of an error is unchanged."""
        return g if self.output is None else rotate(rotate(g, self.output).T, self.output).T

    def restore(self, w: Matrix) -> Matrix:
        w = unrotate(w, self.input)
        return w if self.output is None else unrotate(w.T, self.output).T

    def linear(self, x: Float[Tensor, "*batch in"], inner: Inner) -> Tensor:
        y = inner(rotate(x, self.input))
        return y if self.output is None else unrotate(y, self.output)

    def tensors(self) -> dict[str, Tensor]:
        return {"input": self.input} if self.output is None else {"input": self.input, "output": self.output}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Hadamard":
        return Hadamard(tensors["input"], tensors.get("output"))
