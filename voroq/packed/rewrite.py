"""One packed linear in another form with the same dequantized weight, bit for bit.

    unpack(f(packed)).dequantize() == unpack(packed).dequantize()       for f = current, absorb_permutation, larger_table_first
    current(packed).spec == current_spec(packed.spec)
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from voroq.numerics.bits import merge_streams, pack_bits, split_streams, unpack_bits
from voroq.packed.base import Packed, Spec, from_int16
from voroq.packed.legacy import OldSpec, modern
from voroq.packed.vptq_format import VptqSpec


def current(packed: Packed, *, absorb: bool) -> Packed:
    """In the current layout, as the official reader wants it; without its permutation if `absorb` and that is possible."""
    packed = modern(packed)
    return larger_table_first(absorb_permutation(packed) if absorb else packed)


def current_spec(spec: Spec, *, absorb: bool) -> Spec:
    """The spec of `current`, known without tensors."""
    if isinstance(spec, OldSpec):
        spec = spec.current
    if absorb and can_absorb(spec):
        spec = replace(spec, perm=False)
    return replace(spec, k=spec.residual, residual=spec.k) if _misordered(spec) else spec


def can_absorb(spec: Spec) -> bool:
    """Whether there is a permutation and all columns share one table: a single group, no outliers."""
    return isinstance(spec, VptqSpec) and spec.perm and spec.groups == 1 and spec.outliers is None


def _misordered(spec: Spec) -> bool:
    return isinstance(spec, VptqSpec) and spec.residual is not None and spec.residual > spec.k


def absorb_permutation(packed: Packed) -> Packed:
    """Columns stored in the order of the weight, so that no permutation is needed and every product saves one gather.

    `packed` itself unless `can_absorb`.
    """
    spec = packed.spec
    if not can_absorb(spec):
        return packed
    order = torch.argsort(from_int16(packed.tensors["perm"]))
    tensors = {name: tensor for name, tensor in packed.tensors.items() if name != "perm"}
    width = sum(spec.widths)
    codes = unpack_bits(tensors["indices"][0], width, spec.group_size)[:, order]
    return Packed(replace(spec, perm=False), tensors | {"indices": pack_bits(codes, width)[None]})


def larger_table_first(packed: Packed) -> Packed:
    """Main and residual table swapped where the residual one is larger, which the official reader unpacks wrongly. Sums commute."""
    spec = packed.spec
    if not _misordered(spec):
        return packed
    new = replace(spec, k=spec.residual, residual=spec.k)
    tables = {"centroids.weight": packed.tensors["res_centroids.weight"], "res_centroids.weight": packed.tensors["centroids.weight"]}
    indices = torch.stack([_swapped(words, spec, new) for words in packed.tensors["indices"]])
    return Packed(new, {**packed.tensors, **tables, "indices": indices})


def _swapped(words: Int[Tensor, "rows w"], old: VptqSpec, new: VptqSpec) -> Int[Tensor, "rows w"]:
    codes = split_streams(unpack_bits(words, sum(old.widths), old.group_size).long(), old.widths)
    return pack_bits(merge_streams(codes.flip(-1), new.widths), sum(new.widths))
