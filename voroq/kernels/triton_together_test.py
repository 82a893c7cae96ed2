"""Linears that read the same input share launches: the same bits as one by one, over families, ragged shapes and tilings."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from voroq.codebook.gain_shape import GainShape
from voroq.codebook.grid import Grid
from voroq.kernels import matmul, matmuls, pick, reference, triton_kernel, triton_plan
from voroq.kernels.triton_form import Tiling, batch_class, pieces, tiling
from voroq.packed.base import Packed
from voroq.packed.conftest import random_band, random_pyramids, random_table, random_transform, random_vptq
from voroq.packed.format import pack
from voroq.quantized import Quantized, Tile

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = 112
"""Of all linears here: divides into words along the input of up to 16; groups and bands end anywhere."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
KERNELS = ("arrange", "thin", "wide", "collect")


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("VOROQ_KERNEL", "triton")
    triton_plan.plan.cache_clear()


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """How often each kernel is launched."""
    from voroq.kernels import triton_product

    found = Counter()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_product, name)

        def __getitem__(self, grid: tuple[int, ...]):
            found[self.name] += 1
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(triton_product, name, Counted(name))
    return found


def packed(q: Quantized, layout: str = "voroq", real: torch.dtype = torch.float16) -> Packed:
    made = pack(q, real, layout)
    return Packed(made.spec, {name: tensor.to(DEVICE) for name, tensor in made.tensors.items()})


def tables(out: int, seed: int, **more) -> Packed:
    return packed(random_vptq(out, COLUMNS, seed, **more), "vptq")


def native(out: int, seed: int, codebook, tile: Tile, edges: list[int], *steps: str, zero: bool = False) -> Packed:
    rng = torch.Generator().manual_seed(seed)
    bands = [random_band(a, b, tile, codebook, out, rng, scale=True, zero=zero) for a, b in pairwise(edges)]
    transform = random_transform(COLUMNS, steps, rng, out)
    return packed(Quantized((out, COLUMNS), transform, tuple(b for b, _ in bands), tuple(c for _, c in bands)), real=torch.float32)


def grid(out: int, bits: int, *steps: str) -> Packed:
    return native(out, bits, Grid(bits), Tile(1, 1), [0, 20, 40, 60, 107, COLUMNS], *steps, zero=bits % 2 == 1)


def along(out: int, v: int, sizes: tuple[int, ...]) -> Packed:
    return native(out, out, random_table(sizes, v, torch.Generator().manual_seed(v)), Tile(1, v), [0, 40, COLUMNS])


def pyramids(out: int, seed: int, dim: int, tile: Tile, *steps: str) -> Packed:
    return native(out, seed, random_pyramids(dim, (3, 5), 1, torch.Generator().manual_seed(seed)), tile, [0, 64, COLUMNS], *steps)


FAMILIES = {
    "tables": lambda: [
        tables(43, 1, v=6, sizes=(64, 16), outliers=(5, 4, 16), steps=("affine", "permute")),
        tables(13, 2, v=4, sizes=(256,), groups=2, steps=("permute",)),
        tables(7, 3, v=8, sizes=(16, 16), steps=("rows",)),
    ],
    "tables along": lambda: [along(37, 8, (32, 8)), along(5, 4, (16,))],
    "grids": lambda: [grid(41, 2), grid(11, 3, "permute"), grid(11, 4), grid(6, 8, "affine", "permute")],
    "pyramids": lambda: [pyramids(33, 1, 8, Tile(8, 1)), pyramids(9, 2, 16, Tile(1, 16)), pyramids(9, 3, 8, Tile(8, 1))],
    "rotated": lambda: [
        pyramids(32, 1, 8, Tile(8, 1), "rotate_in"),
        pyramids(16, 2, 16, Tile(1, 16), "affine", "rotate_both"),
        pyramids(9, 3, 8, Tile(8, 1)),
    ],
    "gains and shapes": lambda: [native(17, g, GainShape(8, 7, torch.rand(g) + 0.5), Tile(8, 1), [0, COLUMNS]) for g in (2, 16)],
    "of every family": lambda: [
        tables(43, 1, v=3, outliers=(6, 3, 8), steps=("affine",)),
        grid(19, 3, "permute"),
        pyramids(10, 4, 16, Tile(16, 1), "rotate_in"),
    ],
    "all alike": lambda: [tables(24, seed, v=8, steps=("affine", "permute")) for seed in (1, 2)],
    "one": lambda: [tables(24, 1, outliers=(5, 4, 16))],
}


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_has_the_bits_it_has_alone(family, batch):
    linears, dtype = FAMILIES[family](), list(TOLERANCE)[(len(family) + batch) % 3]
    x = torch.randn(batch, COLUMNS, generator=torch.Generator().manual_seed(batch)).to(DEVICE, dtype)
    assert all(pick(each.spec, x) == "triton" for each in linears)
    for each, y in zip(linears, matmuls(x, linears), strict=True):
        assert y.dtype == dtype and torch.equal(y, matmul(x, each))
        expected = x.double() @ reference.weight(each, torch.float64).T
        assert (y.double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(("batch", "kernel"), [(4, "thin"), (5, "wide")])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_one_product(family, batch, kernel, launched):
    linears, x = FAMILIES[family](), torch.randn(batch, COLUMNS, device=DEVICE)
    forms = [piece.form for each in linears for piece in pieces(each.spec)]
    stages = {tiling(form, batch_class(batch), *triton_kernel._device(x.device)).stages for form in forms}
    matmuls(x, linears)
    assert launched[kernel] == len(stages) and (kernel == "wide" or len(stages) == 1)
    assert launched["arrange"] <= 1 and launched["collect"] <= 1
    assert set(launched) <= {kernel, "arrange", "collect"}


def test_tilings_that_ask_for_other_launches_get_them(monkeypatch, launched):
    linears, x = FAMILIES["tables"](), torch.randn(3, COLUMNS, device=DEVICE)
    cuts = {43: Tiling(2, 16, 4, 3, 4, 1), 13: Tiling(4, 8, 4, 5, 8, 1), 7: Tiling(1, 32, 4, 1, 4, 1)}
    monkeypatch.setattr(triton_plan, "tiling", lambda form, *_: cuts[form.out])
    together = matmuls(x, linears)
    assert launched["thin"] == 2 and launched["collect"] == 1
    assert all(torch.equal(y, matmul(x, each)) for each, y in zip(linears, together, strict=True))


def test_inputs_of_any_shape_and_more_rows_than_are_multiplied_at_a_time(monkeypatch, launched):
    linears = FAMILIES["of every family"]()
    monkeypatch.setattr(triton_kernel, "MOST", 6)
    for x in (torch.randn(COLUMNS, 3, 5).permute(2, 1, 0), torch.randn(0, COLUMNS), torch.randn(COLUMNS)):
        x = x.to(DEVICE)
        for each, y in zip(linears, matmuls(x, linears), strict=True):
            assert y.shape == (*x.shape[:-1], each.spec.shape[0]) and torch.equal(y, matmul(x, each))


def test_every_output_is_written_and_nothing_else(monkeypatch):
    linears, x, empty = FAMILIES["tables"](), torch.randn(3, COLUMNS, device=DEVICE), torch.empty
    before = [{name: tensor.clone() for name, tensor in each.tensors.items()} for each in linears]
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert all(y.isfinite().all() for y in matmuls(x, linears))
    assert all(torch.equal(each.tensors[name], tensor) for each, own in zip(linears, before, strict=True) for name, tensor in own.items())


def test_equal_specs_need_not_be_one_object():
    linears, x = FAMILIES["all alike"](), torch.randn(1, COLUMNS, device=DEVICE)
    assert linears[0].spec == linears[1].spec and linears[0].spec is not linears[1].spec
    assert all(map(torch.equal, triton_kernel.matmuls(x, linears), matmuls(x, linears)))
