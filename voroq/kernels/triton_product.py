"""y = x @ w.T with w decoded tile by tile: the loops that all families of codes share.

    thin     1 to 4 rows of x: w never leaves registers, multiplied and added up in float32; one sum across lanes at the end
    wide     more rows: tiles of w become operands of the tensor cores, rounded to the type of x as `reference` rounds them
    arrange  x in the order of the stored columns, times their scale, and its product with their shift
    collect  the slices added up, in order, then scales and shifts of rows

A program of `thin` or `wide` owns T.rows rows of words and walks over tiles of T.along words; when there are few rows the walk is split,
and every split writes a slice of its own: no atomics, so equal input gives equal output. F is a `Form`, which says where what lies, T a
`Tiling`; both are constants of the compiled kernel.

Every kernel takes tuples of tensors, one for each linear or piece, all multiplied with as many rows of x: linears that read the same input
share its launches. A program belongs to one of them, by its number; what it does is what it would do in a launch for that one alone.
"""

from typing import no_type_check

import triton
import triton.language as tl

from voroq.kernels.triton_codes import number, plain
from voroq.kernels.triton_grids import grid_words
from voroq.kernels.triton_pyramids import pyramid_words, shape_words
from voroq.kernels.triton_tables import table_words


@triton.jit
@no_type_check
def thin(pieces, batch, PARTS: tl.constexpr):
    """y[slice + split] = x @ w.T for every piece; x [batch columns] and y [slices batch out] are of any real type."""
    program = tl.program_id(0)
    for i in tl.static_range(len(PARTS)):
        if len(PARTS) == 1 or (program >= PARTS[i].first) & (program < PARTS[i].end):
            x, y, codes, main, second, scales, zeros, book = pieces[i]
            _thin(program - PARTS[i].first, x, y, codes, main, second, scales, zeros, book, batch, PARTS[i].form, PARTS[i].tiling,
                  PARTS[i].slice, PARTS[i].short)  # fmt: skip


@triton.jit
@no_type_check
def wide(pieces, batch, PARTS: tl.constexpr, WIDEN: tl.constexpr):
    """As `thin`; x is in stored order but not scaled: w is, by the scales and shifts of its original columns, before it is rounded.

    WIDEN: to multiply in float32 what was rounded. The interpreter needs it: it takes bfloat16 for the integers it keeps them in.
    """
    program = tl.program_id(0)
    for i in tl.static_range(len(PARTS)):
        if len(PARTS) == 1 or (program >= PARTS[i].first) & (program < PARTS[i].end):
            x, y, codes, main, second, scales, zeros, book, perm, col_scale, col_shift = pieces[i]
            _wide(program - PARTS[i].first, x, y, codes, main, second, scales, zeros, book, perm, col_scale, col_shift, batch,
                  PARTS[i].form, PARTS[i].tiling, PARTS[i].slice, WIDEN)  # fmt: skip


@triton.jit
@no_type_check
def _thin(place, x, y, codes, main, second, scales, zeros, book, batch, F: tl.constexpr, T: tl.constexpr, SLICE: tl.constexpr,
          SHORT: tl.constexpr):  # fmt: skip
    across: tl.constexpr = (F.down + T.rows - 1) // T.rows
    m = place % across * T.rows + tl.arange(0, T.rows)
    split, n = place // across, tl.arange(0, T.batch)
    each: tl.constexpr = (F.along + T.along - 1) // T.along
    share: tl.constexpr = (F.groups * each + T.splits - 1) // T.splits
    x_row = x + n.to(tl.int64)[:, None, None] * F.columns
    sums = tl.zeros([T.batch, T.rows, T.along, F.wide], tl.float32)
    for i in tl.range(split * share, min((split + 1) * share, F.groups * each), num_stages=T.stages):
        g = tl.full([], 0, tl.int64) + i // each
        c = (i % each) * T.along + tl.arange(0, T.along)
        w = _weights(codes, main, second, scales, zeros, book, g, m, c, F, SHORT)
        column, inside = _columns(g, c, F)
        x_tile = tl.load(x_row + column[None, :, :], mask=(n < batch)[:, None, None] & inside[None, :, :], other=0).to(tl.float32)
        sums += w[None, :, :, :] * x_tile[:, None, :, :]
    y += ((SLICE + split.to(tl.int64)) * batch + n[:, None].to(tl.int64)) * F.out
    ok = (n < batch)[:, None]
    if F.is_down:
        row, row_ok = _rows(m, F)
        WIDTH: tl.constexpr = T.rows * F.wide
        tl.store(y + row[None, :], tl.sum(sums, axis=2).reshape(T.batch, WIDTH), mask=ok & row_ok[None, :])
    else:
        tl.store(y + m[None, :], tl.sum(tl.sum(sums, axis=3), axis=2), mask=ok & (m < F.out)[None, :])


@triton.jit
@no_type_check
def _wide(place, x, y, codes, main, second, scales, zeros, book, perm, col_scale, col_shift, batch, F: tl.constexpr, T: tl.constexpr,
          SLICE: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    across: tl.constexpr = (F.down + T.rows - 1) // T.rows
    m = place % across * T.rows + tl.arange(0, T.rows)
    split, n = place // across, tl.program_id(1) * T.batch + tl.arange(0, T.batch)
    each: tl.constexpr = (F.along + T.along - 1) // T.along
    share: tl.constexpr = (F.groups * each + T.splits - 1) // T.splits
    DEEP: tl.constexpr = T.along if F.is_down else T.along * F.wide
    OUT: tl.constexpr = T.rows * F.wide if F.is_down else T.rows
    ok = (n < batch)[:, None]
    x_row = x + n.to(tl.int64)[:, None] * F.columns
    sums = tl.zeros([T.batch, OUT], tl.float32)
    for i in range(split * share, min((split + 1) * share, F.groups * each)):
        g = tl.full([], 0, tl.int64) + i // each
        c = (i % each) * T.along + tl.arange(0, T.along)
        w = _weights(codes, main, second, scales, zeros, book, g, m, c, F, False)
        w = tl.permute(w, (1, 0, 2)).reshape(DEEP, OUT) if F.is_down else tl.trans(w.reshape(OUT, DEEP))
        column, inside = _columns(g, c, F)
        column, inside = column.reshape(DEEP), inside.reshape(DEEP)
        if col_scale is not None:
            o = column if perm is None else _order(perm, column, inside, F.columns)
            w = w * tl.load(col_scale + o, mask=inside, other=0).to(tl.float32)[:, None]
            w += tl.load(col_shift + o, mask=inside, other=0).to(tl.float32)[:, None]
        w = tl.where(inside[:, None], w, 0).to(x.dtype.element_ty)
        x_tile = tl.load(x_row + column[None, :], mask=ok & inside[None, :], other=0)
        if WIDEN:
            w, x_tile = w.to(tl.float32), x_tile.to(tl.float32)
        sums = tl.dot(x_tile, w, sums, input_precision="ieee")
    y += ((SLICE + split.to(tl.int64)) * batch + n[:, None].to(tl.int64)) * F.out
    row, row_ok = _rows(m, F)
    tl.store(y + row[None, :], sums.to(y.dtype.element_ty), mask=ok & row_ok[None, :])


@triton.jit
@no_type_check
def arrange(linears, batch, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """ordered[b, p] = x[b, perm[p]] * scale[perm[p]]; dots[b, block] = sum of x * shift, or of x without one, over a block of p."""
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    for i in tl.static_range(len(linears)):
        if len(linears) == 1 or block // blocks == i:
            x, ordered, dots, perm, scale, shift = linears[i]
            _arrange(block - i * blocks, x, ordered, dots, perm, scale, shift, COLUMNS, BLOCK, blocks)


@triton.jit
@no_type_check
def _arrange(block, x, ordered, dots, perm, scale, shift, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    p = block * BLOCK + tl.arange(0, BLOCK)
    inside = p < COLUMNS
    o = p
    if perm is not None:
        o = _order(perm, p, inside, COLUMNS)
    value = tl.load(x + b * COLUMNS + o, mask=inside, other=0).to(tl.float32)
    if dots is not None:
        part = value
        if shift is not None:
            part *= tl.load(shift + o, mask=inside, other=0).to(tl.float32)
        tl.store(dots + b * BLOCKS + block, tl.sum(part, axis=0))
    if scale is not None:
        value *= tl.load(scale + o, mask=inside, other=0).to(tl.float32)
    if ordered is not None:
        tl.store(ordered + b * COLUMNS + p, value.to(ordered.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def collect(linears, batch, SUMS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """y[b] = sum of slices[:, b] + sum of dots[b]; or, with scales of rows, sum of slices[:, b] * scale + sum of dots[b] * shift."""
    block = tl.program_id(0)
    for i in tl.static_range(len(SUMS)):
        if len(SUMS) == 1 or (block >= SUMS[i].first) & (block < SUMS[i].end):
            slices, y, dots, row_scale, row_shift = linears[i]
            _collect(block - SUMS[i].first, slices, y, dots, row_scale, row_shift, batch, SUMS[i].out, SUMS[i].slices, BLOCKS, BLOCK)


@triton.jit
@no_type_check
def _collect(block, slices, y, dots, row_scale, row_shift, batch, OUT: tl.constexpr, SLICES: tl.constexpr, BLOCKS: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row = block * BLOCK + tl.arange(0, BLOCK)
    ok = row < OUT
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(SLICES):
        total += tl.load(slices + (s * batch + b) * OUT + row, mask=ok, other=0)
    if row_scale is not None:
        total *= tl.load(row_scale + row, mask=ok, other=0).to(tl.float32)
    if dots is not None:
        dot = 0.0
        for i in range(BLOCKS):
            dot += tl.load(dots + b * BLOCKS + i)
        if row_shift is not None:
            total += dot * tl.load(row_shift + row, mask=ok, other=0).to(tl.float32)
        else:
            total += dot
    tl.store(y + b * OUT + row, total.to(y.dtype.element_ty), mask=ok)


@triton.jit
@no_type_check
def _weights(codes, main, second, scales, zeros, book, g, m, c, F: tl.constexpr, SHORT: tl.constexpr):
    """Float32 weights [rows along wide] of the words (m, c) of group g, in the basis of the codes."""
    m_ok = m < F.down
    ok = m_ok[:, None] & (c < F.along)[None, :]
    row = (codes + g * F.group_pitch + m.to(tl.int64) * F.pitch)[:, None]
    place = (g.to(tl.int32) * F.group_first + c)[None, :]
    code = plain(row + place, ok) if F.step == 0 else number(row, place * F.step, ok, F.step)
    if F.kind == "table":
        residual = second
        if F.bits2 > 0:
            residual += F.second_first + g * F.second_step
        found = table_words(code, main + g * F.main_step, residual, F.bits, F.bits2, F.size, F.wide, F.entry, SHORT)
    elif F.kind == "grid":
        found = grid_words(code, zeros if zeros is None else zeros + g * F.zero_pitch, m, m_ok, F.step, F.zeroed)
    elif F.kind == "pyramids":
        found = pyramid_words(code, main + g * F.main_step, book, F.halvings, F.levels, F.most, F.log, F.long)
    else:
        found = shape_words(code, main + g * F.main_step, book, F.halvings, F.bits, F.levels, F.most, F.log, F.long)
    if F.scaled:
        found *= tl.load(scales + g * F.down + m, mask=m_ok, other=0).to(tl.float32)[:, None, None]
    return found


@triton.jit
@no_type_check
def _columns(g, c, F: tl.constexpr):
    """The stored columns of the words c of group g, and which of them exist: both [along wide], or [along 1] for words down the output."""
    j = tl.arange(0, 1 if F.is_down else F.wide)
    size: tl.constexpr = 1 if F.is_down else F.size
    column = F.start + (g.to(tl.int32) * F.along + c)[:, None] * size + j[None, :]
    return column, (c < F.along)[:, None] & (j < size)[None, :]


@triton.jit
@no_type_check
def _rows(m, F: tl.constexpr):
    """The rows of the output that the words m write, and which of them exist: [rows * wide], or [rows] for words along the input."""
    WIDE: tl.constexpr = F.wide if F.is_down else 1
    size: tl.constexpr = F.size if F.is_down else 1
    j = tl.arange(0, WIDE)
    row = m[:, None] * size + j[None, :]
    ok = (row < F.out) & (j < size)[None, :]
    COUNT: tl.constexpr = m.shape[0] * WIDE
    return row.reshape(COUNT), ok.reshape(COUNT)


@triton.jit
@no_type_check
def _order(perm, p, inside, COLUMNS: tl.constexpr):
    """perm[p], stored as unsigned 16 bits or as a wider integer; what leads out of the matrix is cut to its sides."""
    o = tl.load(perm + p, mask=inside, other=0)
    o = o.to(tl.int32) & 0xFFFF if perm.dtype.element_ty == tl.int16 else o.to(tl.int64)
    return tl.minimum(tl.maximum(o, 0), COLUMNS - 1)
