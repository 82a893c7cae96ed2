"""The Triton kernels against the reference over the settings they claim, on ragged shapes: interpreted, or on CUDA where there is one.

Every output is poisoned with NaN before it is written. Where no GPU is, a part of each grid runs; the tests marked `gpu` run all of it.
"""

from itertools import pairwise, product

import pytest
import torch

from voroq.codebook.gain_shape import GainShape
from voroq.codebook.grid import Grid
from voroq.codebook.presets import preset
from voroq.codebook.pyramid import Pyramids
from voroq.kernels import KERNELS, matmul, pick, reference, triton_form, triton_kernel, triton_plan
from voroq.kernels.triton_form import Tiling, pieces, shape_key, tiling
from voroq.layer import QuantLinear
from voroq.numerics.bits import split_streams
from voroq.numerics.pyramid import count
from voroq.packed.base import Packed
from voroq.packed.conftest import random_band, random_gptq, random_pyramids, random_table, random_transform, random_vptq
from voroq.packed.format import pack, unpack
from voroq.quantized import Quantized, Tile

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")

TABLES = [(1, (16,)), (2, (4,)), (3, (16,)), (4, (256,)), (4, (8192, 64)), (6, (4096,)), (8, (256, 256)), (8, (8192,)), (10, (32,))]
TABLES += [(12, (64, 32)), (16, (16, 16)), (16, (8192,)), (24, (16,))]
OUTLIERS = [(0, 2, 8), (5, 4, 16), (6, 3, 8), (5, 64, 2)]
STEPS = [(), ("affine", "permute"), ("rows",), ("permute",)]
TYPES = [(torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]
"""Of the tables, and of x."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BATCHES = (1, 3, 7)
"""One row, rows up to 4 padded to a power of two, tiles for tensor cores padded to 16."""


@pytest.fixture(autouse=True)
def asked_for_and_poisoned(monkeypatch):
    monkeypatch.setenv("VOROQ_KERNEL", "triton")
    triton_plan.plan.cache_clear()
    empty = torch.empty

    def poisoned(*shape, **known) -> torch.Tensor:
        made = empty(*shape, **known)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def rows(batch: int, columns: int) -> torch.Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(DEVICE)


def moved(packed: Packed) -> Packed:
    return Packed(packed.spec, {name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()})


def assert_agrees(q: Quantized, layout: str, real: torch.dtype, wanted: torch.dtype, batches=BATCHES) -> None:
    packed = pack(q, real, layout)
    w, packed = unpack(packed).dequantize().double().to(DEVICE), moved(packed)
    for batch in batches:
        x = rows(batch, q.shape[1]).to(wanted)
        assert pick(packed.spec, x) == "triton"
        expected, y = x.double() @ w.T, matmul(x, packed)
        assert y.dtype == wanted and y.shape == expected.shape
        assert (y.double() - expected).abs().max() < TOLERANCE[wanted] * expected.abs().max(), (packed.spec, batch)


def tables_down(v, sizes, groups, outliers, steps, batches=BATCHES) -> None:
    q = random_vptq(43, outliers[0] + groups * 53, 7, v=v, sizes=sizes, groups=groups, outliers=outliers, steps=steps)
    assert_agrees(q, "vptq", *TYPES[(v + groups + outliers[0]) % 3], batches)


def tables_along(v, sizes, scale, batches=BATCHES) -> None:
    rng = torch.Generator().manual_seed(3)
    edges = [0, 5 * v, 10 * v, 31 * v]
    bands = [random_band(a, b, Tile(1, v), random_table(sizes, v, rng), 37, rng, scale=scale) for a, b in pairwise(edges)]
    q = Quantized((37, edges[-1]), random_transform(edges[-1], ("permute",), rng), tuple(b for b, _ in bands), tuple(c for _, c in bands))
    assert_agrees(q, "voroq", *TYPES[v % 3], batches)


def grids(bits, zero, steps, batches=BATCHES) -> None:
    rng = torch.Generator().manual_seed(bits)
    edges = [0, 20, 40, 60, 91, 96]
    bands = [random_band(a, b, Tile(1, 1), Grid(bits), 41, rng, scale=True, zero=zero) for a, b in pairwise(edges)]
    q = Quantized((41, 96), random_transform(96, steps, rng, 41), tuple(b for b, _ in bands), tuple(c for _, c in bands))
    assert_agrees(q, "voroq", torch.float32, torch.float32, batches)


def words(codebook, down: bool, batches=BATCHES) -> None:
    """Pyramids, or gains and shapes; a band and a half of them, with scales."""
    rng, tile = torch.Generator().manual_seed(codebook.dim), Tile(codebook.dim, 1) if down else Tile(1, codebook.dim)
    out, edges = (2 * codebook.dim + 1, [0, 9, 18, 23]) if down else (7, [0, 3 * codebook.dim, 6 * codebook.dim, 7 * codebook.dim])
    bands = [random_band(a, b, tile, codebook, out, rng, scale=down) for a, b in pairwise(edges)]
    q = Quantized((out, edges[-1]), random_transform(edges[-1], (), rng), tuple(b for b, _ in bands), tuple(c for _, c in bands))
    assert_agrees(q, "voroq", torch.float32, torch.float32, batches)


SETTINGS = list(product([1, 3], OUTLIERS, STEPS))


@pytest.mark.parametrize("case", range(2 * len(TABLES)))
def test_tables_down_the_output(case):
    tables_down(*TABLES[case // 2], *SETTINGS[(case * 7) % len(SETTINGS)])


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("v", "sizes"), TABLES[1::2], ids=str)
def test_tables_along_the_input(v, sizes, scale):
    tables_along(v, sizes, scale, BATCHES[scale::2])


@pytest.mark.parametrize("bits", range(1, 9))
def test_grids(bits):
    grids(bits, bool(bits % 2), [(), ("permute",), ("affine", "permute"), ("rotate_in", "permute"), ("rotate_both",)][bits % 5])


def test_groups_of_every_eight_columns():
    assert_agrees(random_gptq(19, 8 * 7 + 3, 1), "voroq", torch.float16, torch.float32)


PYRAMIDS = [(2, (3, 1), 0), (4, (5, 2, 9), 3), (8, (6,), 0), (8, (1, 4, 20), 2), (16, (3, 4), 0), (32, (2, 6), 2)]
PRESETS = [(8, 16), (8, 40), (16, 32), (16, 64)]


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("case", [*PYRAMIDS, *PRESETS], ids=str)
def test_pyramids(case, down):
    book = random_pyramids(*case, torch.Generator().manual_seed(1)) if len(case) == 3 else preset(*case)
    words(book, down, (1, 7))


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize(("dim", "pulses", "gains"), [(4, 3, 2), (8, 7, 16), (16, 30, 4)])
def test_gains_and_shapes(dim, pulses, gains, down):
    words(GainShape(dim, pulses, torch.rand(gains) + 0.5), down, (1, 7))


def test_the_first_and_last_number_of_every_level_and_those_that_divide_exactly():
    """What a wrong comparison or division would get wrong first: numbers at every edge, and multiples of every divisor, one less too."""
    for book in (preset(16, 64), Pyramids(8, (9, 3), torch.tensor([0.3, 0.7]))):
        starts = [sum(count(book.dim, k) for k in book.pulses[:i]) for i in range(len(book.pulses) + 1)]
        divisors = [count(book.dim // 2, k) for k in range(max(book.pulses) + 1)]
        numbers = {start + near for start in starts for near in (-1, 0, 1)}
        numbers |= {starts[-2] + 3 * r - near for r in divisors for near in (0, 1)} | {(1 << book.bits) - 1}
        numbers = sorted(n for n in numbers if 0 <= n < 1 << book.bits)
        signed = torch.tensor([n - (1 << 64) if n >= 1 << 63 else n for n in numbers])
        codes = split_streams(signed, book.widths)
        band, _ = random_band(0, len(numbers), Tile(book.dim, 1), book, book.dim, torch.Generator())
        q = Quantized((book.dim, len(numbers)), random_transform(0, (), torch.Generator()), (band,), (codes[None],))
        packed = moved(pack(q, torch.float32, "voroq"))
        for batch in (1, 5):
            x = rows(batch, len(numbers))
            y, w = matmul(x, packed), reference.weight(packed, torch.float64)
            assert (y - x.double() @ w.T).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_cuda)])  # interpreted: cut off
def test_tiles_for_tensor_cores_are_the_weight_of_the_reference_bit_for_bit(dtype):
    linears = [random_vptq(43, 41, 2, v=v, sizes=s, outliers=(5, 4, 16), steps=("affine", "permute")) for v, s in TABLES[3:6]]
    packed = [pack(q, torch.float16, "vptq") for q in linears] + [pack(random_gptq(21, 45, 2, bits=3, group=16), torch.bfloat16, "voroq")]
    for each in map(moved, packed):
        columns = each.spec.shape[1]
        assert torch.equal(matmul(torch.eye(columns, dtype=dtype, device=DEVICE), each).T, reference.weight(each, dtype)), each.spec


def test_any_tiling_computes_the_same(monkeypatch):
    packed = moved(pack(random_vptq(43, 92, 2, v=6, sizes=(64, 16), groups=2, steps=("affine", "permute")), torch.float16, "vptq"))
    for batch, cuts in {3: [(4, 16, 4, 1), (8, 8, 4, 7)], 20: [(4, 16, 16, 1), (8, 32, 32, 30)]}.items():
        x = rows(batch, 92)
        expected = x.double() @ reference.weight(packed, torch.float64).T
        for cut in cuts:
            monkeypatch.setattr(triton_plan, "tiling", lambda *_, cut=cut: Tiling(*cut, 4, 2))
            triton_plan.plan.cache_clear()
            y = matmul(x, packed)
            assert (y - expected).abs().max() < 1e-5 * expected.abs().max(), cut
            assert torch.equal(y, matmul(x, packed))


def test_tables_of_odd_vectors_are_filled_up_where_that_is_worth_it(monkeypatch):
    tables = ((6, (64,)), (12, (64, 32)), (8, (16, 16)))
    linears = [random_vptq(43, 90, 2, v=v, sizes=sizes, groups=2, outliers=(6, 3, 8)) for v, sizes in tables]
    rng = torch.Generator().manual_seed(0)
    band, codes = random_band(0, 42, Tile(1, 6), random_table((32, 8), 6, rng), 19, rng, scale=True)
    packed = [pack(q, torch.float16, "vptq") for q in linears]
    packed.append(pack(Quantized((19, 42), random_transform(42, (), rng), (band,), (codes,)), torch.float16, "voroq"))
    for each, batch in product(map(moved, packed), (1, 5)):
        x = rows(batch, each.spec.shape[1])
        expected = matmul(x, each)
        monkeypatch.setattr(triton_plan, "WORTH", 0)
        triton_plan.plan.cache_clear()
        assert torch.equal(matmul(x, each), expected), each.spec


def test_more_rows_than_are_multiplied_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_kernel, "MOST", 40)
    packed = moved(pack(random_vptq(19, 48, 2, v=4, steps=("permute",)), torch.float16, "vptq"))
    x = rows(101, 48)
    torch.testing.assert_close(matmul(x, packed), reference.matmul(x, packed), rtol=1e-5, atol=1e-5)
    assert matmul(x[:0], packed).shape == (0, 19)
    strided = torch.randn(48, 3, 2, device=DEVICE).permute(2, 1, 0)
    torch.testing.assert_close(matmul(strided, packed), reference.matmul(strided, packed), rtol=1e-5, atol=1e-5)


def test_nothing_stored_is_changed():
    q = random_vptq(43, 106, 2, v=6, sizes=(64, 16), outliers=(5, 4, 16), steps=("affine", "permute"))
    packed = moved(pack(q, torch.float16, "vptq"))
    before = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    for batch in BATCHES:
        matmul(rows(batch, 106), packed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.tensors.items())


def test_no_file_can_make_a_kernel_read_elsewhere():
    """Numbers of outliers too large for their table, and places outside of x, are read as others inside."""
    packed = moved(pack(random_vptq(43, 106, 2, outliers=(5, 4, 16), steps=("permute",)), torch.float16, "vptq"))
    packed.tensors["outlier_indices"].fill_(-1)
    packed.tensors["perm"][3:9] = -1
    for batch in BATCHES:
        assert matmul(rows(batch, 106), packed).isfinite().all()


def test_a_layer_with_bias_and_its_gradient():
    packed = moved(pack(random_vptq(43, 106, 2, steps=("affine", "permute")), torch.float32, "vptq"))
    layer, x, above = QuantLinear.holding(packed, torch.arange(43.0, device=DEVICE)), rows(3, 106), rows(3, 43)
    torch.testing.assert_close(layer(x), layer.dequantize()(x), rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    (matmul(x, packed) * above).sum().backward()
    torch.testing.assert_close(x.grad, above @ unpack(packed).dequantize(), rtol=1e-4, atol=1e-4)


def test_what_the_kernels_lack_is_left_to_the_reference():
    rng = torch.Generator().manual_seed(0)
    square, codes = random_band(0, 8, Tile(2, 4), random_table((16,), 8, rng), 32, rng)
    odd, numbers = random_band(0, 8, Tile(12, 1), random_pyramids(12, (3, 4), 0, rng), 32, rng)
    three, stages = random_band(0, 8, Tile(4, 1), random_table((4, 4, 4), 4, rng), 32, rng)
    for band, own in ((square, codes), (odd, numbers), (three, stages)):
        spec = pack(Quantized((32, 8), random_transform(8, (), rng), (band,), (own,)), torch.float16, "voroq").spec
        assert pieces(spec) is None and not triton_kernel.supports(spec, rows(1, 8))
    spec = pack(random_vptq(43, 106, 2), torch.float16, "vptq").spec
    assert not triton_kernel.supports(spec, rows(1, 106).double())
    assert not triton_kernel.supports(spec, rows(1, 106).to("meta"))


def test_the_interpreter_must_be_asked_for_twice(monkeypatch):
    spec = pack(random_vptq(43, 106, 2), torch.float16, "vptq").spec
    monkeypatch.delenv("VOROQ_KERNEL")
    assert pick(spec, torch.zeros(1, 106)) != "triton"
    monkeypatch.setenv("VOROQ_KERNEL", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not triton_kernel.supports(spec, torch.zeros(1, 106))
    assert list(KERNELS) == ["cpu", "triton", "reference"]


def test_versions_of_triton_that_cannot_compile_the_kernels_are_left_alone():
    known = {"3.3.1": False, "3.7.0": False, "3.8.0": True, "3.10.0+git1a2b": True, "4.0.0": True}
    assert {version: triton_kernel.recent(version) for version in known} == known


def test_a_measured_tiling_replaces_the_rule(monkeypatch):
    form = pieces(pack(random_vptq(43, 106, 2, v=4, sizes=(16,)), torch.float16, "vptq").spec)[0].form
    assert shape_key(form, 3) == "table down4 bits4 43x106 batch4"
    monkeypatch.setattr(triton_form, "_measured", lambda: {"a device": {shape_key(form, 3): [2, 32, 4, 1, 8, 2]}})
    assert tiling(form, 3, "a device", 100) == Tiling(2, 32, 4, 1, 8, 2)
    assert tiling(form, 3, "another", 100) != tiling(form, 3, "a device", 100)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("family", ["down", "along", "grids"])
def test_the_whole_grid_on_cuda(family):
    batches = (1, 2, 3, 4, 5, 16, 17, 40, 129, 1030)
    if family == "down":
        for table, setting in product(TABLES, SETTINGS):
            tables_down(*table, *setting, batches)
    elif family == "along":
        for table, scale in product(TABLES, (False, True)):
            tables_along(*table, scale, batches)
    else:
        for bits, zero, steps in product(range(1, 9), (False, True), [(), ("permute",), ("affine", "permute"), ("rotate_both",)]):
            grids(bits, zero, steps, batches)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_cuda_graph_and_a_compiled_layer_compute_the_same(batch):
    packed = moved(pack(random_vptq(4096, 1024, 2, v=8, sizes=(256, 256), steps=("affine", "permute")), torch.float16, "vptq"))
    layer, x = QuantLinear.holding(packed), rows(batch, 1024).half()
    expected = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
