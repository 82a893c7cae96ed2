"""Codes out of 32-bit words: bits [bit, bit + WIDTH) of a row, which may straddle words (`numerics/bits.py` has the layout)."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def field(words, bit, ok, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """The WIDTH <= 32 bits from `bit` on, as uint32; 0 where not `ok`. All `bit` are multiples of STEP, but for whole words more.

    Nothing behind the word that holds the last bit is read, so rows need no padding.
    """
    word, shift = bit >> 5, bit & 31
    found = tl.load(words + word, mask=ok, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if 32 % STEP != 0 and STEP % 32 != 0:
        spills = shift + WIDTH > 32
        above = tl.load(words + word + 1, mask=ok & spills, other=0).to(tl.uint32, bitcast=True)
        found |= tl.where(spills, above << ((32 - shift) & 31).to(tl.uint32), 0)
    if WIDTH < 32:
        found &= (1 << WIDTH) - 1
    return found


@triton.jit
@no_type_check
def number(words, bit, ok, STEP: tl.constexpr):
    """The STEP bits from `bit` on, as uint32, or uint64 above 32 bits."""
    if STEP <= 32:
        return field(words, bit, ok, STEP, STEP)
    else:
        low = field(words, bit, ok, 32, STEP).to(tl.uint64)
        return low | field(words, bit + 32, ok, STEP - 32, STEP).to(tl.uint64) << 32


@triton.jit
@no_type_check
def plain(codes, ok):
    """Codes that are integers of 16 or 32 bits, as uint32; 0 where not `ok`."""
    found = tl.load(codes, mask=ok, other=0).to(tl.uint32)
    return found & 0xFFFF if codes.dtype.element_ty == tl.int16 else found
