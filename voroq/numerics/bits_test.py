import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voroq.numerics import bits
from voroq.numerics.bits import code_dtype, pack_bits, unpack_bits, words_for


def bit_by_bit(row: list[int], width: int) -> list[int]:
    """The format read literally: bit n of the stream is bit n % 32 of word n // 32."""
    stream = [(value >> b) & 1 for value in row for b in range(width)]
    stream += [0] * (-len(stream) % 32)
    words = [sum(bit << i for i, bit in enumerate(stream[at : at + 32])) for at in range(0, len(stream), 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@st.composite
def matrices(draw):
    width = draw(st.integers(1, 64))
    rows, count = draw(st.integers(0, 3)), draw(st.integers(1, 40))
    value = st.integers(0, 2**width - 1).map(lambda v: v - 2**64 if v >= 2**63 else v)
    return width, count, draw(st.lists(st.lists(value, min_size=count, max_size=count), min_size=rows, max_size=rows))


@given(matrices())
@settings(deadline=None)
def test_packing_follows_the_bit_by_bit_definition_and_unpacking_inverts_it(matrix):
    width, count, rows = matrix
    values = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), count)
    words = pack_bits(values, width)
    assert words.dtype == torch.int32 and words.shape == (len(rows), words_for(count, width))
    assert words.tolist() == [bit_by_bit(row, width) for row in rows]
    codes = unpack_bits(words, width, count)
    assert codes.dtype == code_dtype(width)
    assert torch.equal(codes.long(), values)


def test_golden_words_with_a_code_that_straddles_two_words():
    # 12-bit codes 0xABC 0xDEF 0x123: bits 24..35 of the third cross the word boundary
    words = pack_bits(torch.tensor([[0xABC, 0xDEF, 0x123]]), 12)
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x23DEFABC, 0x1]


@pytest.mark.parametrize("width", [3, 8, 11, 16, 24, 37, 52, 60])
def test_slicing_rows_does_not_change_the_result(width, monkeypatch):
    values = torch.randint(0, 2**width, (17, 33), generator=torch.Generator().manual_seed(width))
    whole = pack_bits(values, width)
    monkeypatch.setattr(bits, "_SLICE", 40)
    assert torch.equal(pack_bits(values, width), whole)
    assert torch.equal(unpack_bits(whole, width, 33).long(), values)


def test_values_out_of_range_and_rows_of_the_wrong_length_are_refused():
    for bad in (-1, 8):
        with pytest.raises(ValueError, match="0 to 7 to fit in 3 bits"):
            pack_bits(torch.tensor([[1, bad]]), 3)
    with pytest.raises(ValueError, match="need rows of 2 words, got 1"):
        unpack_bits(torch.zeros(1, 1, dtype=torch.int32), 17, 2)
    with pytest.raises(ValueError, match="1 to 64 bits"):
        pack_bits(torch.tensor([[0]]), 65)
