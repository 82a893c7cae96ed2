"""One packed linear in another form with the same dequantized weight, bit for bit.

    unpack(f(packed)).dequantize() == unpack(packed).dequantize()       for f = absorb_permutation, larger_table_first
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from voroq.numerics.bits import pack_bits, unpack_bits
from voroq.packed.base import Packed, from_int16, merge_streams, split_streams
from voroq.packed.vptq_format import VptqSpec


def absorb_permutation(packed: Packed) -> Packed:
    """Columns stored in the order of the weight, so that no permutation is needed and every product saves one gather.

    Possible where all columns share one table: a single group, no outliers. Otherwise, and for other layouts, `packed` itself.
    """
    spec = packed.spec
    if not isinstance(spec, VptqSpec) or not spec.perm or spec.groups > 1 or spec.outliers is not None:
        return packed
    order = torch.argsort(from_int16(packed.tensors["perm"]))
    tensors = {name: tensor for name, tensor in packed.tensors.items() if name != "perm"}
    width = sum(spec.widths)
    codes = unpack_bits(tensors["indices"][0], width, spec.group_size)[:, order]
    return Packed(replace(spec, perm=False), tensors | {"indices": pack_bits(codes, width)[None]})


def larger_table_first(packed: Packed) -> Packed:
    """Main and residual table swapped where the residual one is larger, which the official reader unpacks wrongly. Sums commute."""
    spec = packed.spec
    if not isinstance(spec, VptqSpec) or spec.residual is None or spec.residual <= spec.k:
        return packed
    new = replace(spec, k=spec.residual, residual=spec.k)
    tables = {"centroids.weight": packed.tensors["res_centroids.weight"], "res_centroids.weight": packed.tensors["centroids.weight"]}
    indices = torch.stack([_swapped(words, spec, new) for words in packed.tensors["indices"]])
    return Packed(new, {**packed.tensors, **tables, "indices": indices})


def _swapped(words: Int[Tensor, "rows w"], old: VptqSpec, new: VptqSpec) -> Int[Tensor, "rows w"]:
    codes = split_streams(unpack_bits(words, sum(old.widths), old.group_size).long(), old.widths)
    return pack_bits(merge_streams(codes.flip(-1), new.widths), sum(new.widths))
