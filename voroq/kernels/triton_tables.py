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
def table_words(code, main, second, BITS: tl.constexpr, BITS2: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Float32 words [p q WIDE] of codes [p q]; WIDE is the power of two from SIZE on, entries past SIZE are 0."""
    j = tl.arange(0, WIDE)[None, None, :]
    at = (code & ((1 << BITS) - 1)).to(tl.int32)[:, :, None] * SIZE + j
    found = _entries(main, at, j, SIZE, WIDE)
    if BITS2 > 0:
        at = ((code >> BITS) & ((1 << BITS2) - 1)).to(tl.int32)[:, :, None] * SIZE + j
        found += _entries(second, at, j, SIZE, WIDE)
    return found


@triton.jit
@no_type_check
def _entries(table, at, j, SIZE: tl.constexpr, WIDE: tl.constexpr):
    if SIZE == WIDE:
        return tl.load(table + at, eviction_policy="evict_last").to(tl.float32)
    else:
        return tl.load(table + at, mask=(at >= 0) & (j < SIZE), other=0, eviction_policy="evict_last").to(tl.float32)
