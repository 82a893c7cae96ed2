"""The pyramid P(d, k): integer vectors of length d whose magnitudes sum to k pulses. How many, which is nearest, and which is number i.

    V(n, k) = V(n-1, k) + V(n, k-1) + V(n-1, k-1)       V(n, 0) = 1, V(0, k > 0) = 0

The numbering is the split order ("split-v1" in files): a vector of n entries is cut into its first n // 2 and the rest; with k1 pulses
on the left,

    index(y) = sum_{j < k1} V(h, j) V(n-h, k-j)  +  index(left) V(n-h, k-k1)  +  index(right)        index((+k)) = 0, index((-k)) = 1

so that both halves can be decoded at once and n = 16 takes four steps. Indices are int64, hence V(d, k) < 2**63. (Fischer 1986; van der
Ouderaa et al. 2024, arXiv 2410.16926. The split order is what Opus uses across bands, here all the way down.)
"""

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from voroq.shapes import Vectors

STRETCHES = (0.95, 1.0, 1.05, 1.1, 1.2, 1.35)
"""Factors on k / ||x||_1 tried by `nearest_direction`. The best one is above 1 at few pulses: small entries get none."""


@lru_cache(maxsize=64)
def counts(dim: int, pulses: int) -> tuple[tuple[int, ...], ...]:
    """V(n, k) for n = 0..dim and k = 0..pulses, exactly."""
    rows = [(1,) + (0,) * pulses]
    for _ in range(dim):
        above, row = rows[-1], [1]
        for k in range(1, pulses + 1):
            row.append(above[k] + row[-1] + above[k - 1])
        rows.append(tuple(row))
    return tuple(rows)


def count(dim: int, pulses: int) -> int:
    """V(dim, pulses): the points of one pyramid."""
    return counts(dim, pulses)[dim][pulses]


def project(x: Vectors, pulses: Int[Tensor, "n"]) -> Vectors:
    """The nearest point of P(d, pulses[i]) to every `x[i]`, as numbers of the dtype of `x`; of equally near ones, any.

    With y = round(|x| + t), negatives cut to 0, no vector with the same sum is nearer, whatever t; from such a y, one pulse to the largest
    remainder (or from the smallest) gives the nearest vector with one more (or less). t spreads what is missing, so few are left to move.
    Entries more than pulses + 1 below the largest get no pulse, and a common shift of all others changes nothing: so none is larger.
    """
    size = x.abs()
    largest = size.amax(1, keepdim=True)
    size = (size - largest + largest.minimum(pulses[:, None] + 1)).clamp_min(0)
    t = ((pulses - size.sum(1, dtype=torch.float64)) / x.shape[1]).to(x)[:, None]
    for _ in range(2):  # towards the t at which nothing is missing: spread it over the entries that stay above 0
        above = size + t > 0
        t = ((pulses - (size * above).sum(1, dtype=torch.float64)) / above.sum(1).clamp_min(1)).to(x)[:, None]
    y = (size + t).round_().clamp_min_(0)
    missing = pulses - y.sum(1)
    rows = missing.nonzero()[:, 0]
    left, size_here, y_here = missing[rows], size[rows], y[rows]
    for _ in range(int(left.abs().nan_to_num(0).max()) if rows.numel() else 0):
        add = left > 0
        rest = size_here - y_here
        score = torch.where(add[:, None], rest, torch.where(y_here > 0, -rest, -torch.inf))
        step = left.sign()
        y_here.scatter_add_(1, score.argmax(1, keepdim=True), step[:, None])
        left = left - step
        done = left == 0
        y[rows[done]] = y_here[done]
        rows, left, size_here, y_here = rows[~done], left[~done], size_here[~done], y_here[~done]
    return torch.where(x < 0, -y, y)


def nearest_direction(x: Vectors, pulses: int) -> Vectors:
    """The point of P(d, pulses) with the smallest angle to each `x`, nearly always: the best of six projections.

    Every optimal point is the projection of some multiple of x, so only the multiple is searched.
    """
    scale = pulses / x.abs().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    wanted = torch.full((x.shape[0],), pulses, device=x.device)
    best, least = project(x, wanted), torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=x.device)
    for stretch in STRETCHES:
        y = project(x * (stretch * scale)[:, None], wanted)
        cosine = (x * y).sum(1) / y.norm(dim=1).clamp_min(1)
        better = cosine > least
        best, least = torch.where(better[:, None], y, best), torch.where(better, cosine, least)
    return best


def index_of(y: Int[Tensor, "n d"]) -> Int[Tensor, "n"]:
    """The number of every `y` within its own pyramid, in the split order."""
    index, _ = _number(y.long(), int(y.abs().sum(1).max()) if y.numel() else 0)
    return index


def vector_of(index: Int[Tensor, "n"], pulses: Int[Tensor, "n"], dim: int) -> Int[Tensor, "n dim"]:
    """Inverse of `index_of`: vector number `index[i]` of P(dim, pulses[i]). Numbers must be below `count(dim, pulses[i])`."""
    return _vectors(index.long(), pulses.long(), dim, int(pulses.max()) if pulses.numel() else 0)


def _number(y: Int[Tensor, "n d"], most: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """Index and pulses of every row."""
    rows, dim = y.shape
    if dim == 1:
        return (y[:, 0] < 0).long(), y[:, 0].abs()
    half = dim // 2
    if dim % 2 == 0:
        both, pulses = _number(y.reshape(2 * rows, half), most)
        (left, right), (k_left, k_right) = both.reshape(rows, 2).unbind(1), pulses.reshape(rows, 2).unbind(1)
    else:
        (left, k_left), (right, k_right) = _number(y[:, :half], most), _number(y[:, half:], most)
    below, radix = _tables(dim, most, y.device)
    k = k_left + k_right
    return below[k, k_left] + left * radix[k_right] + right, k


def _vectors(index: Int[Tensor, "n"], pulses: Int[Tensor, "n"], dim: int, most: int) -> Int[Tensor, "n dim"]:
    if dim == 1:
        return torch.where(index == 1, -pulses, pulses)[:, None]
    if dim == 2:
        return _pairs(index, pulses)
    below, radix = _tables(dim, most, index.device)
    row, k_left, step = pulses * below.shape[1], torch.zeros_like(pulses), below.shape[1] // 2
    flat = below.reshape(-1)
    while step:  # the last column whose entry is at most the index; columns past the pulses hold the largest integer
        tried = k_left + step
        k_left = torch.where(flat[row + tried] <= index, tried, k_left)
        step //= 2
    rest, k_right = index - flat[row + k_left], pulses - k_left
    radices = radix[k_right]
    left = rest.div(radices, rounding_mode="floor")
    right, half = rest - left * radices, dim // 2
    if dim % 2 == 0:
        parts = _vectors(torch.stack((left, right), 1).reshape(-1), torch.stack((k_left, k_right), 1).reshape(-1), half, most)
        return parts.reshape(index.shape[0], dim)
    return torch.cat((_vectors(left, k_left, half, most), _vectors(right, k_right, dim - half, most)), dim=1)


def _pairs(index: Int[Tensor, "n"], pulses: Int[Tensor, "n"]) -> Int[Tensor, "n 2"]:
    """`_vectors` for dim 2, where the sums have a closed form: 0, 2, 6, 10, ..."""
    left = (index + 2) >> 2
    right = pulses - left
    rest = index - (4 * left - 2).clamp_min(0)
    sign_right = torch.where(right > 0, rest & 1, 0)
    sign_left = torch.where(right > 0, rest >> 1, rest)
    return torch.stack((torch.where(sign_left == 1, -left, left), torch.where(sign_right == 1, -right, right)), dim=1)


@lru_cache(maxsize=64)
def _tables(dim: int, most: int, device: torch.device) -> tuple[Int[Tensor, "k w"], Int[Tensor, "k"]]:
    """below[k, k1] = sum_{j < k1} V(h, j) V(dim - h, k - j), and radix[k] = V(dim - h, k), for up to `most` pulses.

    The width is a power of two above `most`; entries past k1 = k are the largest integer. Entries that no index below 2**63 can
    reach are cut to it too.
    """
    half, table, largest = dim // 2, counts(dim, most), 2**63 - 1
    width = 1 << (most + 1).bit_length()
    rows = []
    for k in range(most + 1):
        row = [0]
        for j in range(k):
            row.append(row[-1] + table[half][j] * table[dim - half][k - j])
        rows.append([min(entry, largest) for entry in row] + [largest] * (width - k - 1))
    radix = [min(entry, largest) for entry in table[dim - half]]
    return torch.tensor(rows, device=device), torch.tensor(radix, device=device)
