"""Packed linears with random contents, for self-tests and benchmarks: any bits are codes of some weight."""

import torch

from voroq.packed.base import Packed, Role, Spec


def random_packed(spec: Spec, dtype: torch.dtype, seed: int = 0) -> Packed:
    """A linear of `spec` whose tables and scales are `dtype`."""
    rng = torch.Generator().manual_seed(seed)

    def contents(stored) -> torch.Tensor:
        if stored.role is Role.PERM:
            return torch.randperm(stored.shape[0], generator=rng).to(stored.dtypes[0])
        if stored.role is Role.CODES:
            top = torch.iinfo(stored.dtypes[0]).max if stored.limit is None else stored.limit - 1
            low = -top - 1 if stored.limit is None else 0
            return torch.randint(low, top + 1, stored.shape, generator=rng).to(stored.dtypes[0])
        return torch.randn(stored.shape, generator=rng).to(dtype) * spec.shape[1] ** -0.5

    return Packed(spec, {stored.name: contents(stored) for stored in spec.layout()})
