"""Little-endian bit streams: rows of small integers packed into 32-bit words.

Code c of a row occupies bits [c*width, (c+1)*width) of that row's stream; bit n lives in word n // 32 at position n % 32. A code
may straddle words, and every row is padded with zero bits to whole words. Words are int32, the two's complement view of
uint32 (neither NCCL nor older torch moves unsigned integers).

    unpack_bits(pack_bits(values, width), width, count) == values

Both directions work on slices of rows, so that the extra memory stays near `_SLICE` codes (some tens of MB) whatever the size
of the matrix. Unpacking bit by bit, as the reference does, costs 8 * width bytes per code.
"""

import torch
from jaxtyping import Int
from torch import Tensor

_SLICE = 1 << 20
"""Codes handled at a time."""

_WORD = 0xFFFFFFFF

_VIEWS = {8: torch.uint8, 16: torch.int16}
"""Widths whose codes are whole bytes of the (little-endian) words."""


def words_for(count: int, width: int) -> int:
    """32-bit words of a row of `count` codes."""
    return -(-count * width // 32)


def code_dtype(width: int) -> torch.dtype:
    """The smallest signed integer type that holds every code of `width` bits."""
    return torch.int16 if width < 16 else torch.int32 if width < 32 else torch.int64


def pack_bits(values: Int[Tensor, "r c"], width: int) -> Int[Tensor, "r w"]:
    """`values` [r c], each 0 <= value < 2**width, as int32 words [r ceil(c*width/32)]. Raises ValueError for a value out of range.

    At a width of 64 the values are int64 with the bits of uint64, and all are in range.
    """
    _check_width(width)
    rows, count = values.shape
    words = torch.zeros(rows, words_for(count, width), dtype=torch.int32, device=values.device)
    if values.numel() == 0:
        return words
    low, high = int(values.min()), int(values.max())
    if width < 64 and (low < 0 or high >= 1 << width):
        raise ValueError(f"codes must be 0 to {(1 << width) - 1} to fit in {width} bits, got {low} to {high}")
    first, shift = _places(count, width, values.device)
    for part in _row_slices(rows, count):
        whole = values[part].long()
        # Codes that share a word occupy disjoint bits, so adding is or-ing. Columns too many catch the empty spill of the last code.
        sums = torch.zeros(whole.shape[0], words.shape[1] + _halves(width), dtype=torch.int64, device=values.device)
        for half in range(_halves(width)):
            spread = ((whole >> 32 * half) & _WORD) << shift  # at most 32 + 31 bits
            sums.index_add_(1, first + half, spread & _WORD)
            sums.index_add_(1, first + half + 1, (spread >> 32) & _WORD)
        words[part] = _signed(sums[:, : words.shape[1]])
    return words


def unpack_bits(words: Int[Tensor, "r w"], width: int, count: int) -> Int[Tensor, "r c"]:
    """The first `count` codes of each row of int32 `words`, in the smallest signed type that holds them.

    Raises ValueError when the rows are not exactly as long as `count` codes need.
    """
    _check_width(width)
    if words.shape[1] != words_for(count, width):
        raise ValueError(f"{count} codes of {width} bits need rows of {words_for(count, width)} words, got {words.shape[1]}")
    if width in _VIEWS:
        codes = words.contiguous().view(_VIEWS[width])[:, :count]
        return codes.to(code_dtype(width)) & ((1 << width) - 1)
    values = torch.empty(words.shape[0], count, dtype=code_dtype(width), device=words.device)
    if values.numel() == 0:
        return values
    first, shift = _places(count, width, words.device)
    mask = (1 << width) - 1 if width < 64 else -1
    for part in _row_slices(words.shape[0], count):
        unsigned = torch.nn.functional.pad(words[part].long() & _WORD, (0, 1))
        pairs = unsigned[:, :-1] | (unsigned[:, 1:] << 32)  # [r w], each word with its successor
        codes = pairs[:, first] >> shift
        if width > 32:  # what the shift brought down from above is cut off, then the high half comes from the next pair
            codes = (codes & _WORD) | ((pairs[:, first + 1] >> shift) & _WORD) << 32
        values[part] = (codes & mask).to(values.dtype)
    return values


def merge_streams(codes: Int[Tensor, "*n s"], widths: tuple[int, ...]) -> Int[Tensor, "*n"]:
    """One integer per vector: main | residual << bits of main | ..."""
    merged = codes[..., 0].long()
    shift = widths[0]
    for s, width in enumerate(widths[1:], start=1):
        merged = merged | codes[..., s].long() << shift
        shift += width
    return merged


def split_streams(merged: Int[Tensor, "*n"], widths: tuple[int, ...]) -> Int[Tensor, "*n s"]:
    """Inverse of `merge_streams`."""
    if len(widths) == 1:
        return merged[..., None]
    parts = []
    for width in widths:
        parts.append(merged & ((1 << width) - 1))
        merged = merged >> width
    return torch.stack(parts, dim=-1)


def _places(count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Word and shift [count] where each code starts."""
    bit = torch.arange(count, device=device) * width
    return bit >> 5, bit & 31


def _halves(width: int) -> int:
    return 1 if width <= 32 else 2


def _signed(unsigned: Tensor) -> Tensor:
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32)


def _row_slices(rows: int, count: int) -> list[slice]:
    step = max(1, _SLICE // count)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _check_width(width: int) -> None:
    if not 1 <= width <= 64:
        raise ValueError(f"a code has 1 to 64 bits, got {width}")
