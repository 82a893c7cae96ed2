"""Words of a table: word = main[code % 2**BITS] + second[code >> BITS], v-wide loads at computed addresses.

Tables are read where they lie, [k SIZE] row by row, and stay in the L1 cache of a multiprocessor up to some 4096 entries, above in L2.
(Triton has no shared memory to put them into; L1 is the same memory.) A code that is too large for its table names another entry of it:
no file can make a kernel read elsewhere.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def table_words(code, main, second, BITS: tl.constexpr, BITS2: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, ENTRY: tl.constexpr,
                SHORT: tl.constexpr):  # fmt: skip
    """Float32 words [p q WIDE] of codes [p q]; WIDE is the power of two from SIZE on, entries past SIZE are 0.

    A word of the table has ENTRY numbers, SIZE or, already filled up, WIDE. SHORT: both are added as they are, if in float16.
    """
    j = tl.arange(0, WIDE)[None, None, :]
    at = (code & ((1 << BITS) - 1)).to(tl.int32)[:, :, None] * ENTRY + j
    found = _entries(main, at, j, SIZE, ENTRY, WIDE)
    if BITS2 > 0:
        at = ((code >> BITS) & ((1 << BITS2) - 1)).to(tl.int32)[:, :, None] * ENTRY + j
        residual = _entries(second, at, j, SIZE, ENTRY, WIDE)
        if SHORT and found.dtype == tl.float16:
            found += residual
        else:
            found = found.to(tl.float32) + residual.to(tl.float32)
    return found.to(tl.float32)


@triton.jit
@no_type_check
def _entries(table, at, j, SIZE: tl.constexpr, ENTRY: tl.constexpr, WIDE: tl.constexpr):
    if ENTRY == WIDE:
        return tl.load(table + at, eviction_policy="evict_last")
    else:
        return tl.load(table + at, mask=(at >= 0) & (j < SIZE), other=0, eviction_policy="evict_last")


@triton.jit
@no_type_check
def widen(table, wide, rows, SIZE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """`table` [rows SIZE] with zeros behind every row: `wide` [rows WIDE]. Aligned rows are read at once, others in pieces."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, j = place // WIDE, place % WIDE
    ok = row < rows
    tl.store(wide + place, tl.load(table + row * SIZE + j, mask=ok & (j < SIZE), other=0), mask=ok)
