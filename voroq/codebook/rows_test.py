"""Rows coded one by one: the error the presets promise, the bits that are counted, a literal twin."""

import pytest
import torch

from voroq.codebook.presets import distortion, preset
from voroq.codebook.rows import RowCode
from voroq.errors import VoroqError
from voroq.numerics.hadamard import random_signs, rotate, unrotate


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2.0, 2.5, 3.0, 3.25, 4.0])
@pytest.mark.parametrize("size", [64, 128])
def test_the_error_on_gaussian_rows_is_that_of_the_preset(size: int, bits: float):
    code, x = RowCode(size, bits), 37.0 * normal(4, 256, size)
    back = code.decode(*code.encode(x))
    relative = float((back - x).square().sum() / x.square().sum())
    assert relative < 1.02 * distortion(16, code.width)  # the scale that fits a row takes a little off, its rounding adds 2e-6
    assert relative > 0.9 * distortion(16, code.width)


def test_an_outlier_channel_is_spread():
    """One channel a hundred times the others: without the rotation its neighbours would vanish."""
    code, x = RowCode(64, 4.0), normal(512, 64)
    x[:, 5] += 100
    back = code.decode(*code.encode(x))
    assert (back - x).square().sum() / x.square().sum() < 1.3 * distortion(16, 64)


STORED = [(64, 4.0, 4.25), (64, 2.5, 2.75), (128, 3.0, 3.125), (80, 3.0, 3.4), (24, 3.0, 4.66667)]


@pytest.mark.parametrize(("size", "bits", "stored"), STORED)
def test_shapes_and_bits_are_those_promised(size: int, bits: float, stored: float):
    code = RowCode(size, bits)
    words, scale = code.encode(normal(2, 3, 5, size).bfloat16())
    assert words.shape[:-1] == scale.shape == (2, 3, 5) and words.dtype == torch.int32 and scale.dtype == torch.bfloat16
    assert code.stored_bits == pytest.approx(stored, abs=1e-4)
    assert 8 * (words.numel() * 4 + scale.numel() * 2) == pytest.approx(code.stored_bits * 30 * size)
    assert code.decode(words, scale).shape == (2, 3, 5, size)


def test_literal_twin_and_rows_do_not_know_each_other():
    code, x = RowCode(48, 3.0, seed=7), normal(20, 48)
    back, signs, book = code.decode(*code.encode(x)), random_signs(48, torch.Generator().manual_seed(7)), preset(16, 48)
    for i in range(20):
        row = rotate(x[i].double(), signs)
        unit = (row / row.square().mean().sqrt()).float().reshape(3, 16)
        words = book.decode(book.encode(unit)).double().reshape(48)
        scale = ((row * words).sum() / words.square().sum()).bfloat16().double()
        assert torch.allclose(back[i].double(), unrotate(scale * words, signs), atol=1e-4)
        assert torch.equal(code.decode(*code.encode(x[i : i + 1]))[0], back[i])


@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e20])
def test_any_magnitude_comes_back(factor: float):
    code, x = RowCode(16, 4.0), factor * normal(9, 16)
    back = code.decode(*code.encode(x))
    assert torch.isfinite(back).all() and float((back - x).double().square().sum()) <= 0.05 * float(x.double().square().sum())


def test_the_seed_turns_and_the_empty_is_empty():
    x = normal(4, 32)
    assert not torch.equal(RowCode(32, 2.0, 0).encode(x)[0], RowCode(32, 2.0, 1).encode(x)[0])
    assert RowCode(32, 2.0).decode(*RowCode(32, 2.0).encode(x[:0])).shape == (0, 32)


def test_what_has_no_pyramids_is_refused():
    with pytest.raises(VoroqError, match="rows of 20 numbers cannot be cut into pyramids; multiples of 8 can"):
        RowCode(20, 3.0)
    with pytest.raises(VoroqError, match="5 bits are out of range for rows of 64 numbers; give 1 to 4"):
        RowCode(64, 5.0)
