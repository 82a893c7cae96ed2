"""Randomised Hadamard rotations of any dimension: q = diag(signs) h / sqrt(n), an orthogonal matrix that spreads every entry over all.

h is a matrix of ones and minus ones with h h^T = n I. Those of order 2^k come from Sylvester's doubling; a core of another order
comes from Paley's two constructions (J. Math. Phys. 12, 1933) over the field with p^e elements, and 2^k * core is their Kronecker
product. 384 = 32 * 12, 3584 = 128 * 28 and 11008 = 32 * 344 are such. Where n is no such product (an odd n, say), h is block
diagonal with the largest blocks that fit. Along one vector this costs n (core + k) operations; no matrix of order n is formed.
"""

from functools import cache, lru_cache
from itertools import product

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

LARGEST_CORE = 1024
"""The largest core that is looked for; it is multiplied with as a dense matrix."""


def random_signs(n: int, rng: torch.Generator) -> Float[Tensor, "n"]:
    """`n` signs (float64, on the CPU) drawn from `rng`: the random half of a rotation."""
    return (torch.randint(0, 2, (n,), generator=rng) * 2 - 1).double()


def rotate(x: Float[Tensor, "*rows n"], signs: Shaped[Tensor, "n"]) -> Float[Tensor, "*rows n"]:
    """x q, for q = diag(signs) h / sqrt(n)."""
    return hadamard(x * signs.to(x))


def unrotate(x: Float[Tensor, "*rows n"], signs: Shaped[Tensor, "n"]) -> Float[Tensor, "*rows n"]:
    """x q^T: the inverse of `rotate`."""
    return hadamard(x, transposed=True) * signs.to(x)


def hadamard(x: Float[Tensor, "*rows n"], *, transposed: bool = False) -> Float[Tensor, "*rows n"]:
    """x h / sqrt(n), or x h^T / sqrt(n), along the last axis in the dtype and on the device of `x`; orthogonal."""
    block, order = split(x.shape[-1])
    core = paley(order).to(x)
    parts = x.reshape(-1, block // order, order) @ (core.T if transposed else core)  # [rows * blocks 2^k core]
    width = 1
    while width < block // order:
        pairs = parts.reshape(-1, block // order // (2 * width), 2, width * order)
        parts = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        width *= 2
    return (parts * block**-0.5).reshape(x.shape)


@cache
def split(n: int) -> tuple[int, int]:
    """(block, core): h of order `n` is n / block copies of a Hadamard matrix of order block = 2^k * core; the largest block, then
    the smallest core."""
    if n < 1:
        raise ValueError(f"no rotation of dimension {n}; dimensions start at 1")
    for block in (n // copies for copies in range(1, n + 1) if n % copies == 0):
        core = block // (block & -block)
        while core <= min(block, LARGEST_CORE):
            if core in (1, 2) or _field(core) is not None:
                return block, core
            core *= 2
    raise AssertionError("a block of 1 always fits")


@lru_cache(maxsize=8)
def paley(order: int) -> Float[Tensor, "n n"]:
    """The Hadamard matrix of an `order` that Paley constructed, float64. Raises ValueError for any other order above 2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    if order == 1:
        return one
    plane = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order == 2:
        return plane
    field = _field(order)
    if field is None:
        raise ValueError(f"Paley has no Hadamard matrix of order {order}; take one that is p^e + 1 or 2 (p^e + 1), a multiple of 4")
    prime, power = field
    size = prime**power
    border = torch.ones(1, size, dtype=torch.float64)
    jacobsthal = _characters(prime, power)
    eye = torch.eye(size + 1, dtype=torch.float64)
    if size % 4 == 3:  # a skew conference matrix
        return eye + torch.cat((torch.cat((0 * one, border), 1), torch.cat((-border.T, jacobsthal), 1)))
    conference = torch.cat((torch.cat((0 * one, border), 1), torch.cat((border.T, jacobsthal), 1)))
    return torch.kron(conference, plane) + torch.kron(eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64))


def _field(order: int) -> tuple[int, int] | None:
    """(p, e) of the field from which Paley makes a matrix of `order`: its first construction if both do; None if neither does."""
    if order % 4:
        return None
    for size, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        power = _prime_power(size)
        if size % 4 == remainder and power is not None:
            return power
    return None


def _prime_power(size: int) -> tuple[int, int] | None:
    """(p, e) with p^e = size and e <= 3, or None."""
    prime = next((p for p in range(2, int(size**0.5) + 1) if size % p == 0), size)
    return next(((prime, e) for e in (1, 2, 3) if size > 1 and prime**e == size), None)


def _characters(prime: int, power: int) -> Float[Tensor, "size size"]:
    """chi(a - b) for all elements a, b of the field with prime^power elements: 0 for 0, 1 for squares, -1 for the others."""
    elements = torch.tensor(list(product(range(prime), repeat=power)))  # polynomials, lowest coefficient first
    place = prime ** torch.arange(power - 1, -1, -1)  # an element's number is its digits in base p
    character = -torch.ones(len(elements), dtype=torch.float64)
    character[(_squares(elements, prime) * place).sum(1)] = 1
    character[0] = 0
    differences = (elements[:, None] - elements[None]) % prime
    return character[(differences * place).sum(2)]


def _squares(elements: Int[Tensor, "size power"], prime: int) -> Int[Tensor, "size power"]:
    """Every element squared, modulo an irreducible monic polynomial (one without roots: that suffices up to degree 3)."""
    power = elements.shape[1]
    full = torch.zeros(len(elements), 2 * power - 1, dtype=torch.long)
    for i, j in product(range(power), repeat=2):
        full[:, i + j] += elements[:, i] * elements[:, j]
    modulus = torch.tensor(_irreducible(prime, power))
    for top in range(2 * power - 2, power - 1, -1):  # x^top = -(lower terms of the modulus) x^(top - power)
        full[:, top - power : top] -= full[:, top : top + 1] * modulus
    return full[:, :power] % prime


def _irreducible(prime: int, power: int) -> tuple[int, ...]:
    """The lower coefficients, lowest first, of a monic polynomial of degree `power` without roots modulo `prime`."""
    if power == 1:
        return (0,)
    for lower in product(range(prime), repeat=power):
        if all((x**power + sum(c * x**i for i, c in enumerate(lower))) % prime for x in range(prime)):
            return lower
    raise AssertionError("every finite field has irreducible polynomials of every degree")
