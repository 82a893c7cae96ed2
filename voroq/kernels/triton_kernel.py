"""y = x @ w.T on CUDA without building w, by Triton. Tables, grids and pyramids, words down the output or along the input.

What a spec needs is found once and kept (`triton_form`); a call looks up its tensors by name, launches, and holds nothing: CUDA graphs can
capture it after one call outside. Launches: `arrange` if x must be reordered or scaled, one for each piece, `collect` if there
are several slices. All sums in float32, in a fixed order.

Triton is imported at the first product. With TRITON_INTERPRET=1 in the environment it interprets kernels on the CPU, very slowly: for
tests, and only if VOROQ_KERNEL=triton asks for it.
"""

import os
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.kernels.triton_form import THIN, Form, Piece, Tiling, batch_class, pieces, tiling
from voroq.packed.base import Packed, Spec
from voroq.packed.native_format import NativeSpec

REALS = (torch.float32, torch.float16, torch.bfloat16)
MOST = 1024
"""Rows of x multiplied at a time, so that slices stay small."""
WORTH = 1 << 20
"""Words of a matrix from which on tables of odd vector lengths are filled up first, to be read in whole words."""
BLOCK = 1024
"""Columns or rows of a program that does not decode."""


def supports(spec: Spec, x: Float[Tensor, "*batch in"]) -> bool:
    return x.dtype in REALS and _runs_on(x.device) and pieces(spec) is not None


def matmul(x: Float[Tensor, "*batch in"], packed: Packed) -> Float[Tensor, "*batch out"]:
    spec, flat = packed.spec, x.reshape(-1, x.shape[-1]).contiguous()
    tensors = {name: tensor.contiguous() for name, tensor in packed.tensors.items()}
    if isinstance(spec, NativeSpec) and set(spec.steps) - {"permute"}:
        inside = replace(spec, steps=())
        y = spec.transform(tensors).linear(flat.float(), lambda inner: _multiply(inner.contiguous(), inside, tensors)).to(x.dtype)
    else:
        y = _multiply(flat, spec, tensors)
    return y.reshape(*x.shape[:-1], spec.shape[0])


def _multiply(x: Float[Tensor, "n in"], spec: Spec, tensors: dict[str, Tensor]) -> Float[Tensor, "n out"]:
    y = torch.empty(x.shape[0], spec.shape[0], dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # where Triton launches
        for first in range(0, x.shape[0], MOST):
            _part(x[first : first + MOST], y[first : first + MOST], spec, tensors)
    return y


def _part(x: Float[Tensor, "n in"], y: Float[Tensor, "n out"], spec: Spec, tensors: dict[str, Tensor]) -> None:
    """y = x @ w.T, all of it written."""
    from voroq.kernels import triton_product as product  # imports triton

    batch, thin = x.shape[0], x.shape[0] <= THIN
    perm, scale, shift, by_row = _basis(spec, tensors)
    own = (None, None) if by_row else (scale, shift)
    blocks = -(-x.shape[1] // BLOCK)
    dots = _floats(x, batch, blocks) if by_row or (thin and shift is not None) else None
    ordered = x
    if perm is not None or (thin and own[0] is not None) or dots is not None:
        scaled = own if thin else (None, None)
        moved = perm is not None or scaled[0] is not None
        ordered = torch.empty(x.shape, dtype=torch.float32 if thin else x.dtype, device=x.device) if moved else x
        product.arrange[(blocks, batch)](x, ordered if moved else None, dots, perm, *scaled, batch, x.shape[1], BLOCK)

    launches = [(piece, _tiling(piece, x)) for piece in pieces(spec)]
    slices = sum(cut.splits for _, cut in launches)
    alone = slices == 1 and dots is None
    into = y if alone else _floats(x, slices, *y.shape)
    first = 0
    for piece, cut in launches:
        form, (codes, main, second, *rest) = piece.form, (tensors[name] if name else None for name in piece.names)
        if _worth_widening(form):
            main, second, form = _wide(main, form), _wide(second, form), form.widened()
        args = [ordered, into, codes, main, second, *rest, _book(piece, x.device)]
        grid, known = (-(-form.down // cut.rows), cut.splits), {"num_warps": cut.warps, "num_stages": cut.stages}
        if thin:
            short = second is not None and x.dtype == main.dtype == torch.float16  # one rounding, as that to the type of x would be
            product.thin[grid](*args, batch, form, cut, first, short, **known)
        else:
            product.wide[(*grid, -(-batch // cut.batch))](*args, perm, *own, batch, form, cut, first, interpreted(), **known)
        first += cut.splits
    if not alone:
        rows = (scale, shift) if by_row else (None, None)
        grid = -(-y.shape[1] // BLOCK), batch
        product.collect[grid](into, y, dots, *rows, batch, y.shape[1], slices, blocks, BLOCK)


def _worth_widening(form: Form) -> bool:
    return form.kind == "table" and form.entry != form.wide and form.down * form.along * form.groups >= WORTH


def _wide(table: Tensor | None, form: Form) -> Tensor | None:
    """`table` with every word filled up to a power of two."""
    from voroq.kernels.triton_tables import widen

    if table is None:
        return None
    rows = table.numel() // form.size
    wide = torch.empty(rows, form.wide, dtype=table.dtype, device=table.device)
    widen[(-(-wide.numel() // BLOCK),)](table, wide, rows, form.size, form.wide, BLOCK)
    return wide


def _basis(spec: Spec, tensors: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """Permutation, scale and shift, and whether these are of rows; of native specs only the permutation, the rest is done outside."""
    if isinstance(spec, NativeSpec):
        return tensors["weight_perm"] if "permute" in spec.steps else None, None, None, False
    scale, shift = (tensors[name] if spec.norm else None for name in ("weight_scale", "weight_bias"))
    return tensors["perm"] if spec.perm else None, scale, shift, spec.norm and spec.norm_dim == 1


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _tiling(piece: Piece, x: Tensor) -> Tiling:
    return tiling(piece.form, batch_class(x.shape[0]), *_device(x.device))


def _book(piece: Piece, device: torch.device) -> Tensor | None:
    from voroq.kernels.triton_pyramids import book

    return book(piece.form.size, piece.pulses, device) if piece.pulses else None


@cache
def _device(device: torch.device) -> tuple[str, int]:
    """Name and multiprocessors."""
    if device.type != "cuda":
        return device.type, 2
    return torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).multi_processor_count


def _runs_on(device: torch.device) -> bool:
    if not _installed():
        return False
    return device.type == "cuda" or (device.type == "cpu" and interpreted())


def interpreted() -> bool:
    """Whether Triton is to interpret kernels on the CPU, which must be asked for twice."""
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("VOROQ_KERNEL") == "triton"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
