"""Words of a grid: code - zero. A word is one weight; zero points are packed like codes, along the output, one row of words a group."""

from typing import no_type_check

import triton
import triton.language as tl

from voroq.kernels.triton_codes import field


@triton.jit
@no_type_check
def grid_words(code, zeros, m, m_ok, BITS: tl.constexpr, ZEROED: tl.constexpr):
    """Float32 words [rows along 1] of codes [rows along], less the zero points of the rows m."""
    found = code.to(tl.float32)
    if ZEROED:
        found -= field(zeros, m * BITS, m_ok, BITS, BITS).to(tl.float32)[:, None]
    return found[:, :, None]
