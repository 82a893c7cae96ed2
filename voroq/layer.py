"""A linear whose weight stays packed.

The parameters have exactly the names, shapes and dtypes of the spec's layout, so that a checkpoint loads without conversion.
Integers cannot be trained and the tables are not (yet): nothing here requires a gradient, but gradients flow through to `x`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.kernels import described, key_of, linear
from voroq.packed.base import Packed, Spec
from voroq.packed.format import bits_per_weight, unpack
from voroq.products import product


class Holder(nn.Module):
    """A namespace for one parameter, `weight`, whose stored name has a dot (`centroids.weight`).

    It is read by calling: hooks that bring offloaded weights to the device (accelerate) run on calls.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        return self.weight


class QuantLinear(nn.Module):
    """Stands in for an `nn.Linear`. Real tensors have `dtype`; uninitialised, to be filled by a loader or `holding`.

    `together`, if set, makes the product: along with those of other linears that read the same input (`integrations/siblings.py`).
    """

    together: Callable[["QuantLinear", Tensor], Tensor] | None = None

    def __init__(self, spec: Spec, *, bias: bool, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = spec.shape
        self._describe(spec)
        for stored in spec.layout():
            empty = torch.empty(stored.shape, dtype=dtype if stored.real else stored.dtypes[0], device=device)
            self._put(stored.name, empty)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device), requires_grad=False)

    @staticmethod
    def holding(packed: Packed, bias: Float[Tensor, "out"] | None = None) -> "QuantLinear":
        """A layer that shares the tensors of `packed`."""
        layer = QuantLinear(packed.spec, bias=bias is not None, dtype=torch.float32, device="meta")
        for name, tensor in packed.tensors.items():
            layer._put(name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def become(self, packed: Packed) -> None:
        """Hold `packed` instead, in place: modules and parameters that stay keep their hooks."""
        for stored in self.spec.layout():
            if stored.name not in packed.tensors:
                delattr(self, stored.name.partition(".")[0])
        for name, tensor in packed.tensors.items():
            head, _, leaf = name.rpartition(".")
            owner = self.get_submodule(head) if head else self
            if owner._parameters.get(leaf) is not tensor:
                owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        self._describe(packed.spec)

    def packed(self) -> Packed:
        """The layer's tensors with their spec, not copied."""
        return Packed(self.spec, {name: self._get(name) for name in self._names})

    def operands(self) -> tuple[list[Tensor], str]:
        """Its tensors and its key, as operators take them."""
        return [self._get(name) for name in self._names], self._key

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """`forward` without the bias, computed here and now."""
        if self.activations is None:
            return linear(x, *self.operands())
        return product(x, unpack(self.packed()), self.activations)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.product(x) if self.together is None else self.together(self, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense linear that computes the same, in `dtype` (that of the tables and scales when None).

        Raises VoroqError for a layer that rounds its inputs, which no dense linear does.
        """
        if self.activations is not None:
            raise VoroqError("this linear rounds its inputs (activations in its config); a dense one would not, so it stays as it is")
        packed = self.packed()
        dtype = dtype or next((packed.tensors[s.name].dtype for s in self.spec.layout() if s.real), torch.float32)
        weight = unpack(packed).dequantize().to(dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear

    def extra_repr(self) -> str:
        sides = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        sides += "" if self.activations is None else f", activations={self.activations.bits} bits {self.activations.kind}"
        return f"{sides}, layout={self.spec.method}, bits_per_weight={bits_per_weight(self.packed()):.3f}"

    def _describe(self, spec: Spec) -> None:
        self.spec, self._key = spec, key_of(spec)
        self.activations = spec.activations
        self._names = described(self._key)[1]

    def _put(self, name: str, tensor: Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        head, _, leaf = name.rpartition(".")
        if head:
            self.add_module(head, Holder(parameter))
        else:
            self.register_parameter(leaf, parameter)

    def _get(self, name: str) -> Tensor:
        head, dot, _ = name.partition(".")
        return self._modules[head]() if dot else self._parameters[name]
