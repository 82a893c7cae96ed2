"""Spelled out, a linear means the same to the bit, weighs what it says, and packs and reads like any other."""

from dataclasses import replace

import pytest
import torch

from voroq.activations import Activations
from voroq.codebook.gain_shape import GainShape
from voroq.codebook.presets import preset
from voroq.codebook.pyramid import Pyramids
from voroq.errors import FormatError
from voroq.packed.base import Fields, Packed
from voroq.packed.codebooks import PulsesForm, form_from_json
from voroq.packed.conftest import assert_same, random_band, random_gptq, random_transform
from voroq.packed.expand import can_expand, expanded
from voroq.packed.format import bits_per_weight, pack, spec_from_json, unpack
from voroq.quantized import Quantized, Tile


def linear(book, tile: Tile, *, out: int = 37, columns: int = 64, scale: bool = True) -> Quantized:
    rng = torch.Generator().manual_seed(book.dim)
    bands = [random_band(a, a + columns // 2, tile, book, out, rng, scale=scale) for a in (0, columns // 2)]
    return Quantized(
        (out, columns), random_transform(columns, ("rotate_in",), rng, out), tuple(b for b, _ in bands), tuple(c for _, c in bands)
    )


BOOKS = {"4 bits": Pyramids(8, (3, 7, 5), torch.tensor([1.0, 0.5, 0.7])), "8 bits": preset(16, 48), "64 bits": preset(16, 64)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("name", BOOKS)
def test_the_weight_is_the_same_to_the_bit_and_the_memory_is_counted(name: str, along: bool, dtype: torch.dtype):
    book = BOOKS[name]
    packed = pack(linear(book, Tile(1, book.dim) if along else Tile(book.dim, 1)), dtype, "voroq")
    made = expanded(packed)
    assert torch.equal(unpack(made).dequantize(), unpack(packed).dequantize())
    assert {t.dtype for t in made.tensors.values()} == {torch.int32, torch.int8, dtype}
    entry = 4 if name == "4 bits" else 8
    assert made.spec.runs[0].form.entry == entry and made.tensors["weight_pulses"].shape[0] == made.spec.runs[0].count == 2
    weights = -(-37 // (1 if along else book.dim)) * 64 * (1 if along else book.dim)  # padding rows of tiles are stored too
    assert made.tensors["weight_pulses"].numel() * 8 == entry * weights
    assert bits_per_weight(made) > bits_per_weight(packed)
    again = spec_from_json("voroq", made.spec.to_json(), "m", (37, 64))
    assert again == made.spec
    assert_same(unpack(Packed(again, again.pack(unpack(made), dtype))), unpack(made))


def test_what_is_no_pyramid_and_what_surrounds_it_stays():
    packed = pack(random_gptq(16, 64, 0), torch.float16, "voroq")
    assert not can_expand(packed.spec) and expanded(packed) is packed
    paper = pack(linear(GainShape(8, 5, torch.rand(4) + 0.5), Tile(8, 1)), torch.float16, "voroq")
    assert expanded(paper) is paper
    rounding = Activations(6, "integers")
    one = pack(linear(BOOKS["8 bits"], Tile(16, 1)), torch.float16, "voroq")
    assert expanded(Packed(replace(one.spec, activations=rounding), one.tensors)).spec.activations == rounding


def test_nibbles_are_what_the_format_says():
    """Entry b lies in the low half of byte b, entry b + dim / 2 above it, both in two's complement."""
    form = PulsesForm(4, (7,), 4)
    codes = torch.tensor([[[0, 1 + 7, -2 + 7, 3 + 7, -7 + 7]]], dtype=torch.int16)
    stored = form.store(codes)
    assert [b & 0xFF for b in stored.flatten().tolist()] == [0x31, 0x9E]
    assert torch.equal(form.restore(codes[..., :1], stored), codes)
    with pytest.raises(FormatError, match="do not fit into 4 bits"):
        PulsesForm(4, (9,), 4).store(torch.tensor([[[0, 18, 9, 9, 9]]], dtype=torch.int16))


def test_levels_that_do_not_exist_are_zero():
    form = PulsesForm(2, (3, 2, 4), 8)  # two bits of level, of which 3 names zero
    book = form.codebook(torch.tensor([[1.0], [2.0], [0.5]]))
    assert book.decode(form.restore(torch.tensor([[[3], [1]]]), torch.tensor([[1, -2, 1, -1]])).flatten(0, 1)).tolist() == [[0, 0], [2, -2]]


REFUSED = [
    ({"entry": 6}, "entry must be 4 or 8"),
    ({"dim": 7}, "dim must be even"),
    ({"pulses": [128]}, "pulses must be an integer from 1 to 127"),
    ({"order": "split-v1"}, "unknown field 'order'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_forms_out_of_range_are_refused(change: dict, message: str):
    with pytest.raises(FormatError, match=message):
        form_from_json(Fields({"codebook": {"kind": "pulses", "dim": 8, "pulses": [3], "entry": 8} | change}, "m").nested("codebook"))
