"""Words of pyramids: scale[level] * y, or gain * y / ||y||, with y unfolded from its number by table look-ups, all vectors at once.

    starts[level] <= number < starts[level + 1]          the level; past the last is the zero vector
    index = sum_{j < k1} V(h, j) V(h, k - j) + left * V(h, k - k1) + right          split-v1 (`numerics/pyramid.py`), h = n / 2

Every step halves the vectors: k1 by binary search in a row of the table, then one division. Its divisor r comes from the table with
m = floor(2**64 / r): floor(index * m / 2**64) is the quotient or one less, so a multiplication and a comparison divide exactly. Below
2**32 both are done in 32 bits. Pairs have a closed form.

The tables (`book`): starts and pulses of all levels, then for n = DIM, DIM / 2 .. 4 the sums [k1 of every k], V(h, k) and m of every k.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from voroq.numerics.pyramid import count, counts

LARGEST = 2**63 - 1


@lru_cache(maxsize=64)
def book(dim: int, pulses: tuple[int, ...], device: torch.device) -> Int[Tensor, "n"]:
    """All tables of pyramids of `dim` (a power of two), as int64 with the bits of uint64. Made once for a device and kept."""
    starts = accumulate((count(dim, k) for k in pulses), initial=0)
    most = max(pulses)
    entries = [*starts, *pulses, 0]
    for n in _sizes(dim):
        entries += _halving(n, most, 64 if count(n, most) >= 1 << 31 else 32)
    return torch.tensor([_signed(entry) for entry in entries], device=device)


def _sizes(dim: int) -> Iterator[int]:
    while dim > 2:
        yield dim
        dim //= 2


def _halving(n: int, most: int, bits: int) -> Iterator[int]:
    table, half, columns, largest = counts(n, most), n // 2, 1 << (most + 1).bit_length(), (1 << bits - 1) - 1
    for k in range(most + 1):
        sums = accumulate((table[half][j] * table[half][k - j] for j in range(k)), initial=0)
        row = [min(entry, largest) for entry in sums]
        yield from row + [largest] * (columns - len(row))
    radices = [min(entry, largest) for entry in table[half]]
    yield from radices
    yield from (min((1 << bits) // radix, (1 << bits) - 1) for radix in radices)


def _signed(entry: int) -> int:
    return entry - (1 << 64) if entry >= 1 << 63 else entry


@triton.jit
@no_type_check
def pyramid_words(number, scales, book, HALVINGS: tl.constexpr, LEVELS: tl.constexpr, MOST: tl.constexpr, LOG: tl.constexpr,
                  LONG: tl.constexpr):  # fmt: skip
    """Float32 words [p q 2 << HALVINGS] of numbers [p q]. LONG: halvings that need 64 bits; 1 << LOG: columns of a table of sums."""
    number = number.to(tl.uint64)
    level = tl.zeros(number.shape, tl.int32)
    for i in tl.static_range(LEVELS):
        level += (number >= tl.load(book + i + 1).to(tl.uint64, bitcast=True)).to(tl.int32)
    start = tl.load(book + level)
    pulses = tl.load(book + LEVELS + 1 + level).to(tl.int32)
    index = tl.where(level < LEVELS, number.to(tl.int64, bitcast=True) - start, 0)
    y = unfolded(index, pulses, book + 2 * (LEVELS + 1), HALVINGS, MOST, LOG, LONG)
    scale = tl.load(scales + level, mask=level < LEVELS, other=0).to(tl.float32)
    return scale[:, :, None] * y.to(tl.float32)


@triton.jit
@no_type_check
def shape_words(number, gains, book, HALVINGS: tl.constexpr, BITS: tl.constexpr, GAINS: tl.constexpr, MOST: tl.constexpr, LOG: tl.constexpr,
                LONG: tl.constexpr):  # fmt: skip
    """Words gain * y / ||y|| of one pyramid with MOST pulses; `number` is that of y in BITS bits, then the gain."""
    number = number.to(tl.uint64)
    points = tl.load(book + 1)
    index = tl.minimum((number & ((1 << BITS) - 1)).to(tl.int64, bitcast=True), points - 1)
    gain = tl.load(gains + ((number >> BITS).to(tl.int32) & (GAINS - 1))).to(tl.float32)
    pulses = tl.full(number.shape, MOST, tl.int32)
    y = unfolded(index, pulses, book + 4, HALVINGS, MOST, LOG, LONG).to(tl.float32)
    return (gain / tl.sqrt(tl.sum(y * y, axis=2)))[:, :, None] * y


@triton.jit
@no_type_check
def unfolded(index, pulses, tables, HALVINGS: tl.constexpr, MOST: tl.constexpr, LOG: tl.constexpr, LONG: tl.constexpr):
    """Vector number `index` of P(2 << HALVINGS, pulses): int32 [p q dim] from int64 and int32 [p q]."""
    P: tl.constexpr = index.shape[0]
    Q: tl.constexpr = index.shape[1]
    for i in tl.static_range(HALVINGS):
        index, pulses = _halves(index, pulses, tables + i * (MOST + 1) * ((1 << LOG) + 2), MOST, LOG, i < LONG)
    left, right = _pairs(index.to(tl.int32), pulses)
    return tl.join(left, right).reshape(P, Q, 2 << HALVINGS)


@triton.jit
@no_type_check
def _halves(index, pulses, table, MOST: tl.constexpr, LOG: tl.constexpr, LONG: tl.constexpr):
    WIDTH: tl.constexpr = 1 << LOG
    P: tl.constexpr = index.shape[0]
    Q: tl.constexpr = index.shape[1]
    kind: tl.constexpr = tl.int64 if LONG else tl.int32
    unsigned: tl.constexpr = tl.uint64 if LONG else tl.uint32
    index = index.to(kind)
    row, left = table + pulses * WIDTH, tl.zeros(pulses.shape, tl.int32)
    for i in tl.static_range(LOG):  # the last column whose entry is at most the index; columns past the pulses hold the largest integer
        tried = left + (WIDTH >> i + 1)
        left = tl.where(tl.load(row + tried).to(kind) <= index, tried, left)
    rest, right = index - tl.load(row + left).to(kind), pulses - left
    divide = table + (MOST + 1) * WIDTH + right
    radix = tl.load(divide).to(kind)
    quotient = tl.umulhi(rest.to(unsigned), tl.load(divide + MOST + 1).to(unsigned)).to(kind)
    remainder = rest - quotient * radix
    once_more = remainder >= radix
    quotient = tl.where(once_more, quotient + 1, quotient)
    remainder = tl.where(once_more, remainder - radix, remainder)
    return tl.join(quotient, remainder).reshape(P, 2 * Q), tl.join(left, right).reshape(P, 2 * Q)


@triton.jit
@no_type_check
def _pairs(index, pulses):
    left = (index + 2) >> 2
    right = pulses - left
    rest = index - tl.maximum(4 * left - 2, 0)
    sign_left = tl.where(right > 0, rest >> 1, rest)
    sign_right = tl.where(right > 0, rest & 1, 0)
    return tl.where(sign_left == 1, -left, left), tl.where(sign_right == 1, -right, right)
