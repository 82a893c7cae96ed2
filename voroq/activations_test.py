"""Integer inputs: rounding that is what it says, products of integers that are those of the numbers they stand for."""

import pytest
import torch

from voroq.activations import Activations, most_pulses
from voroq.errors import VoroqError
from voroq.methods import PVQ, RTN
from voroq.moments import Moments
from voroq.numerics.pyramid import count
from voroq.products import integer_product, product

X = torch.randn(40, 160, generator=torch.Generator().manual_seed(1))


def relative(y: torch.Tensor, x: torch.Tensor) -> float:
    return float((y - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_integers_fit_in_their_bits_and_miss_by_half_a_step(bits: int):
    numbers, scale = Activations(bits).integers(X)
    top = 2 ** (bits - 1) - 1
    assert torch.equal(numbers, numbers.round()) and numbers.abs().amax(1).eq(top).all()
    assert ((numbers * scale - X).abs() <= 0.5001 * X.abs().amax(1, keepdim=True) / top).all()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_pulses_add_up_to_the_most_that_the_bits_can_name(bits: int):
    numbers, scale = Activations(bits, "pulses").integers(X)
    for columns in (slice(0, 64), slice(64, 128), slice(128, 160)):
        n, x, k = numbers[:, columns], X[:, columns], most_pulses(columns.stop - columns.start, bits)
        assert n.abs().sum(1).eq(k).all() and torch.equal(n, n.round()) and (n * x >= 0).all()
        assert torch.allclose((scale[:, columns] * n * (x - scale[:, columns] * n)).sum(1), torch.zeros(40), atol=1e-3)  # fits best
        size = n.shape[1]
        assert count(size, k) <= 2 ** (size * bits) < count(size, k + 1)


def test_pulses_lose_less_than_integers_of_as_many_bits():
    """Gaussian tokens at 4 bits: 3 dB and more (spec: 3.8 at groups of 128)."""
    assert relative(Activations(4, "pulses")(X), X) < 0.5 * relative(Activations(4)(X), X)
    errors = [relative(Activations(bits, kind)(X), X) for kind in ("integers", "pulses") for bits in range(4, 9)]
    assert errors[:5] == sorted(errors[:5], reverse=True) and errors[5:] == sorted(errors[5:], reverse=True)


@pytest.mark.parametrize("kind", ["integers", "pulses"])
def test_zeros_and_giants_and_any_shape(kind: str):
    x = torch.zeros(2, 3, 70)
    x[0, 0, 5], x[0, 1] = 1e30, torch.full((70,), 1e-30)
    y = Activations(8, kind)(x)
    assert torch.isfinite(y).all() and torch.equal(y[1], x[1]) and torch.allclose(y, x, rtol=0.02)
    assert Activations(8, kind)(x.bfloat16()).dtype == torch.bfloat16 and Activations(8, kind)(x[:0]).shape == (0, 3, 70)


@pytest.mark.parametrize("along", ["output", "input"])
@pytest.mark.parametrize("rotation", ["none", "input", "both"])
def test_a_product_of_integers_is_the_product(along: str, rotation: str):
    w = torch.randn(37, 160, generator=torch.Generator().manual_seed(2))
    q = PVQ(bits=3.0, along=along, rotation=rotation)(w, Moments.empty(160), torch.Generator())
    for bits in (4, 8):
        exact, integers = product(X, q, Activations(bits)), integer_product(X, q, Activations(bits))
        assert torch.allclose(exact, integers, atol=1e-4)
        assert 0 < relative(exact, q.linear(X)) < 0.1 * 4.0 ** (4 - bits)


def test_gradients_pass_as_if_nothing_were_rounded():
    q, x = PVQ(bits=3.0)(torch.randn(16, 160), Moments.empty(160), torch.Generator()), X.clone().requires_grad_()
    product(x, q, Activations(4)).sum().backward()
    assert torch.allclose(x.grad, q.dequantize().sum(0).expand_as(x), atol=1e-4)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(VoroqError, match="activations in 3 bits are not supported; give 4 to 8"):
        Activations(3)
    with pytest.raises(VoroqError, match="activations as 'floats' are unknown; choose one of integers, pulses"):
        Activations(8, "floats")
    q = RTN(bits=4)(torch.randn(4, 160), Moments.empty(160), torch.Generator())
    with pytest.raises(ValueError, match="needs pyramids and one scale a token; got a Grid"):
        integer_product(X, q, Activations(8))
    with pytest.raises(ValueError, match="and pulses"):
        integer_product(X, PVQ(bits=3.0)(torch.randn(4, 160), Moments.empty(160), torch.Generator()), Activations(8, "pulses"))
