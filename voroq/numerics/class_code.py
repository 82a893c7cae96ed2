"""The class code of short pyramid vectors: how many entries are nonzero, where and how large they are, and their signs.

    index(y) = off[z] + 2^z rank(|y|) + signs        off[z] = sum_{z' < z} C(d, z') C(k-1, z'-1) 2^z'

z counts the nonzero entries, bit b of signs says that the b-th of them is negative, and rank is the place of |y| among all magnitudes with
z nonzero entries and k pulses, in lexicographic order: at every entry, those with a smaller one come first. With
A(n, s, z) = C(n, z) C(s-1, z-1) ways to put s pulses on z of n entries,

    rank(a) = sum_i sum_{v < a_i} A(d-1-i, s_i - v, z_i - [v > 0])          s_i pulses and z_i nonzero entries from i on

A table of all patterns makes decoding one look-up and a spreading of sign bits, which is what it is for: up to some ten pulses it is faster
than the split order (`numerics/pyramid.py`), the default.
"""

from functools import lru_cache
from math import comb

import torch
from jaxtyping import Int
from torch import Tensor

LONGEST = 8
"""Entries of a vector; tables grow with them."""


def ways(entries: int, pulses: int, nonzero: int) -> int:
    """A(n, s, z): magnitudes of n entries, exactly z of them nonzero, that sum to s."""
    if not nonzero:
        return int(pulses == 0)
    return comb(entries, nonzero) * comb(pulses - 1, nonzero - 1) if pulses > 0 else 0


def class_index_of(y: Int[Tensor, "n d"]) -> Int[Tensor, "n"]:
    """The number of every `y`, d at most 8, within its own pyramid, in the class order."""
    dim, size = _dim(y.shape[1]), y.abs().long()
    pulses, nonzero = size.sum(1), (size > 0).sum(1)
    most = int(pulses.max()) if y.numel() else 0
    below, offsets = _below(dim, most, y.device), _offsets(dim, most, y.device)
    rank, signs = torch.zeros_like(pulses), torch.zeros_like(pulses)
    left, there, place = pulses.clone(), nonzero.clone(), torch.zeros_like(pulses)
    for i in range(dim):
        rank += below[i, left, there, size[:, i]]
        left, there = left - size[:, i], there - (size[:, i] > 0).long()
        signs += (y[:, i] < 0).long() << place
        place += (size[:, i] > 0).long()
    return offsets[pulses, nonzero] + (rank << nonzero) + signs


def class_vector_of(index: Int[Tensor, "n"], pulses: Int[Tensor, "n"], dim: int) -> Int[Tensor, "n dim"]:
    """Inverse of `class_index_of`: vector number `index[i]` of P(dim, pulses[i]). Numbers must be below `count(dim, pulses[i])`."""
    index, left = index.long(), pulses.long()
    most = int(left.max()) if left.numel() else 0
    below, offsets = _below(_dim(dim), most, index.device), _offsets(dim, most, index.device)
    there = torch.searchsorted(offsets[left], index[:, None], right=True)[:, 0] - 1
    rest = index - offsets[left, there]
    rank, signs, place = rest >> there, rest & (1 << there) - 1, torch.zeros_like(left)
    entries = []
    for i in range(dim):
        size = torch.searchsorted(below[i, left, there], rank[:, None], right=True)[:, 0] - 1
        rank = rank - below[i, left, there, size]
        left, there = left - size, there - (size > 0).long()
        entries.append(torch.where((signs >> place & 1) == 1, -size, size))
        place = place + (size > 0).long()
    return torch.stack(entries, dim=1)


def _dim(dim: int) -> int:
    if not 1 <= dim <= LONGEST:
        raise ValueError(f"the class code takes vectors of 1 to {LONGEST} entries, got {dim}; use the split order")
    return dim


@lru_cache(maxsize=64)
def _below(dim: int, most: int, device: torch.device) -> Int[Tensor, "d s z v"]:
    """below[i, s, z, v]: magnitudes from entry i on with s pulses on z entries and less than v at entry i; past all of them, the largest
    integer, so that a search for a rank that exists ends before."""
    width = most + 2
    number = torch.tensor([[[ways(n, s, z) for z in range(dim + 1)] for s in range(most + 1)] for n in range(dim + 1)])
    own = torch.zeros(dim, most + 1, dim + 1, width, dtype=torch.long)  # those with exactly v at entry i
    for v in range(most + 1):
        rest = number[:dim].flip(0)[:, : most + 1 - v]
        if v:
            own[:, v:, 1:, v] = rest[:, :, :dim]
        else:
            own[..., 0] = rest
    below = own.cumsum(3) - own
    ended = (below == number[1:].flip(0)[..., None]) & (torch.arange(width) > 0)
    return below.masked_fill(ended, 2**63 - 1).to(device)


@lru_cache(maxsize=64)
def _offsets(dim: int, most: int, device: torch.device) -> Int[Tensor, "k z"]:
    """offsets[k, z]: numbers of vectors of k pulses with fewer than z nonzero entries."""
    rows = []
    for k in range(most + 1):
        row = [0]
        for z in range(dim):
            row.append(row[-1] + (ways(dim, k, z) << z))
        rows.append(row)
    return torch.tensor(rows, device=device)
