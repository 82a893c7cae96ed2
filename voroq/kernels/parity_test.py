"""Every kernel against the reference, over every setting it claims, on ragged shapes; and what does not depend on the machine."""

import subprocess
import sys
from dataclasses import replace
from itertools import cycle, pairwise, product

import pytest
import torch

from voroq import native
from voroq.codebook.gain_shape import GainShape
from voroq.codebook.grid import Grid
from voroq.codebook.pyramid import Pulses, Pyramids
from voroq.errors import VoroqError
from voroq.kernels import KERNELS, cpu, described, key_of, matmul, pick, reference
from voroq.layer import QuantLinear
from voroq.numerics.pyramid import count
from voroq.packed.base import Packed
from voroq.packed.conftest import random_band, random_gptq, random_pyramids, random_table, random_transform, random_vptq
from voroq.packed.format import pack, unpack
from voroq.packed.legacy import OldSpec
from voroq.quantized import Band, Quantized, Tile
from voroq.transform.chain import Chain

needs_library = pytest.mark.skipif(native.library() is None, reason=f"{native.problem()}")
TABLES = [(1, (16,)), (2, (4,)), (3, (16,)), (4, (256,)), (4, (8192, 64)), (6, (4096,)), (8, (256, 256)), (8, (8192,)), (12, (64, 32))]
TABLES += [(16, (16, 16)), (16, (8192,)), (8, (1 << 16,))]
OUTLIERS = [(0, 2, 8), (5, 4, 16), (6, 3, 8), (5, 64, 2)]
TYPES = [(torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BATCHES = (1, 2, 3, 8, 11, 17)
"""One pass of every width, two passes, panels."""


@pytest.fixture(params=range(len(native.isas())), ids=native.isas())
def isa(request, monkeypatch):
    monkeypatch.setattr(cpu, "ISA", request.param)


def rows(batch: int, columns: int) -> torch.Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))


def assert_agrees(q: Quantized, layout: str, real: torch.dtype, wanted: torch.dtype, batches: tuple[int, ...] = BATCHES) -> None:
    packed = pack(q, real, layout)
    w = unpack(packed).dequantize().double()
    for batch in batches:
        x = rows(batch, q.shape[1]).to(wanted)
        assert pick(packed.spec, x) == "cpu"
        expected = x.double() @ w.T
        y = matmul(x, packed)
        assert y.dtype == wanted
        assert (y.double() - expected).abs().max() < TOLERANCE[wanted] * expected.abs().max(), (packed.spec, batch)


def ragged(groups: int, outliers: int) -> int:
    """Columns that divide into groups of an odd width, more than the kernel unpacks at once."""
    return outliers + groups * 157


@needs_library
@pytest.mark.parametrize("steps", [(), ("affine", "permute"), ("rows",)], ids="-".join)
@pytest.mark.parametrize("outliers", OUTLIERS, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("v", "sizes"), TABLES, ids=str)
def test_tables_down_the_output(isa, v, sizes, groups, outliers, steps):
    q = random_vptq(43, ragged(groups, outliers[0]), 7, v=v, sizes=sizes, groups=groups, outliers=outliers, steps=steps)
    real, wanted = TYPES[(v + groups + outliers[0]) % 3]
    assert_agrees(q, "vptq", real, wanted)


@needs_library
@pytest.mark.parametrize("width", range(2, 33))
def test_codes_of_every_width(isa, width):
    """Several of them lie in words, or bytes, of which the kernel reads no more than four at once."""
    sizes = (1 << (width + 1) // 2, 1 << width // 2)
    assert_agrees(random_vptq(5, 157, width, v=2, sizes=sizes, groups=1), "vptq", torch.float32, torch.float32)


@needs_library
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("v", "sizes"), TABLES, ids=str)
def test_tables_along_the_input(isa, v, sizes, scale):
    rng = torch.Generator().manual_seed(3)
    edges = [0, 21 * v, 150 * v]
    bands = [random_band(a, b, Tile(1, v), random_table(sizes, v, rng), 37, rng, scale=scale) for a, b in pairwise(edges)]
    q = Quantized((37, edges[-1]), random_transform(edges[-1], ("permute",), rng), tuple(b for b, _ in bands), tuple(c for _, c in bands))
    assert_agrees(q, "voroq", *TYPES[v % 3])


@needs_library
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [(), ("permute",), ("affine", "permute"), ("rotate_in", "permute"), ("rotate_both",)], ids="-".join)
@pytest.mark.parametrize("bits", range(1, 9))
def test_grids(isa, bits, steps, zero):
    rng = torch.Generator().manual_seed(bits)
    edges = [0, 100, 200, 300, 380, 384]
    bands = [random_band(a, b, Tile(1, 1), Grid(bits), 41, rng, scale=True, zero=zero) for a, b in pairwise(edges)]
    q = Quantized((41, 384), random_transform(384, steps, rng, 41), tuple(b for b, _ in bands), tuple(c for _, c in bands))
    assert_agrees(q, "voroq", torch.float32, torch.float32)


@needs_library
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [(), ("permute",), ("affine", "permute")], ids="-".join)
@pytest.mark.parametrize("bits", range(1, 9))
def test_grids_with_inputs_in_bfloat16(isa, bits, steps, zero):
    """Bands of 128 columns and more are multiplied as they are, up to 12 inputs; others, and more inputs, are not."""
    rng = torch.Generator().manual_seed(bits)
    edges = [0, 128, 256, 356, 499, 800]
    bands = [random_band(a, b, Tile(1, 1), Grid(bits), 53, rng, scale=True, zero=zero) for a, b in pairwise(edges)]
    q = Quantized((53, 800), random_transform(800, steps, rng, 53), tuple(b for b, _ in bands), tuple(c for _, c in bands))
    assert_agrees(q, "voroq", torch.bfloat16, torch.bfloat16, (1, 2, 3, 8, 11, 37))


@needs_library
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("lengths", [(8, 6), (16, 12), (5, 7), (7, 9), (3, 16), (1, 2)], ids=str)
def test_bands_of_several_lengths_with_inputs_in_bfloat16(isa, lengths, along):
    """Strips of 48 rows are whole tiles of every band, but for lengths of 7 and 9."""
    rng, edges = torch.Generator().manual_seed(lengths[0]), [0, 91 * lengths[0], 91 * lengths[0] + 601 * lengths[1]]
    tiles = [Tile(1, v) if along else Tile(v, 1) for v in lengths]
    tables = [random_table((64, 16), v, rng) for v in lengths]
    bands = [random_band(*edges[i : i + 2], tiles[i], tables[i], 113, rng, scale=True) for i in range(2)]
    q = Quantized((113, edges[-1]), random_transform(edges[-1], ("permute",), rng), tuple(b for b, _ in bands), tuple(c for _, c in bands))
    assert_agrees(q, "voroq", torch.float16, torch.bfloat16)


@needs_library
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("dim", [8, 16])
def test_pyramids_with_inputs_in_bfloat16(isa, dim, along):
    book = random_pyramids(dim, (6, 3, 8), 2, torch.Generator().manual_seed(dim))
    assert_agrees(pyramid_linear(dim, book, along=along), "voroq", torch.float16, torch.bfloat16)


PYRAMIDS = [(8, (1,), 0), (8, (6, 3, 8), 2), (8, (99, 127), 9), (16, (3, 12, 8), 0), (16, (22, 26), 1), (16, (52,), 64)]
"""Dimension, pulses, more bits than the points need: left-over numbers are zero vectors. The last one has numbers of 64 bits."""


def pyramid_linear(dim: int, book, *, along: bool, steps: tuple[str, ...] = ()) -> Quantized:
    rng = torch.Generator().manual_seed(dim)
    tile, out, columns = (Tile(1, dim) if along else Tile(dim, 1)), 3 * dim + 5, 160 * dim
    edges = [0, 7 * dim, columns]
    bands = [random_band(a, b, tile, book, out, rng, scale=a == 0) for a, b in pairwise(edges)]
    return Quantized((out, columns), random_transform(columns, steps, rng, out), tuple(b for b, _ in bands), tuple(c for _, c in bands))


@needs_library
@pytest.mark.parametrize("steps", [("permute",), ("rotate_in",), ("rotate_both",)], ids="-".join)
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize(("dim", "pulses", "spare"), PYRAMIDS, ids=str)
def test_pyramids(isa, dim, pulses, spare, along, steps):
    book = random_pyramids(dim, pulses, spare, torch.Generator().manual_seed(spare))
    assert_agrees(pyramid_linear(dim, book, along=along, steps=steps), "voroq", torch.float32, torch.float32)


@needs_library
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize(("pulses", "spare"), [((1,), 0), ((6, 3, 6), 2), ((13, 9, 2), 9), ((16,), 1)], ids=str)
def test_the_class_order(isa, pulses, spare, along):
    book = replace(random_pyramids(8, pulses, spare, torch.Generator().manual_seed(spare)), order="class-v1")
    q = pyramid_linear(8, book, along=along)
    assert_agrees(q, "voroq", torch.float32, torch.float32)
    packed = pack(q, torch.float16, "voroq")
    assert torch.equal(cpu.weight(packed, torch.float32), reference.weight(packed, torch.float32))


@needs_library
def test_every_number_of_a_class_order_is_spelled_out_like_the_reference(isa):
    book = Pyramids(8, (4, 2, 5), torch.rand(3) + 0.5, order="class-v1")
    numbers = torch.arange(1 << book.bits, dtype=torch.int32)[None, :, None]
    q = Quantized((8, numbers.shape[1]), Chain(), (Band(0, numbers.shape[1], Tile(8, 1), book),), (numbers,))
    packed = pack(q, torch.float32, "voroq")
    assert torch.equal(cpu.weight(packed, torch.float32), q.dequantize())


def test_patterns_too_many_for_a_table_are_left_to_the_reference():
    rng = torch.Generator().manual_seed(0)
    book = replace(random_pyramids(8, (40,), 0, rng), order="class-v1")
    band, codes = random_band(0, 8, Tile(8, 1), book, 16, rng)
    spec = pack(Quantized((16, 8), Chain(), (band,), (codes,)), torch.float32, "voroq").spec
    assert pick(spec, rows(1, 8)) == "reference"


@needs_library
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize(("dim", "pulses"), [(8, (3, 7)), (8, (6, 90, 8)), (16, (2, 5)), (16, (12, 8, 127))], ids=str)
def test_pulses(isa, dim, pulses, along):
    """Integers of 4 bits and of 8; levels of every number, also of those that name the zero vector."""
    rng = torch.Generator().manual_seed(dim)
    q, most = pyramid_linear(dim, Pulses(dim, pulses, torch.rand(len(pulses)) + 0.1), along=along, steps=("permute",)), max(pulses)
    entry = 4 if most < 8 else 8
    codes = [torch.cat([c[..., :1], torch.randint(max(-most, -(1 << entry - 1)), min(most, (1 << entry - 1) - 1) + 1, c[..., 1:].shape,
                        generator=rng) + most], -1) for c in q.codes]  # fmt: skip
    q = replace(q, codes=tuple(codes))
    assert_agrees(q, "voroq", torch.float32, torch.float32)
    assert_agrees(q, "voroq", torch.float16, torch.bfloat16)
    packed = pack(q, torch.float16, "voroq")
    assert torch.equal(cpu.weight(packed, torch.float32), reference.weight(packed, torch.float32))


def gain_shape_linear(dim: int, pulses: int, gains: int, *, along: bool) -> Quantized:
    """Codes below the number of points only: what others stand for is not defined."""
    q = pyramid_linear(dim, GainShape(dim, pulses, torch.rand(gains) + 0.5), along=along)
    rng = torch.Generator().manual_seed(pulses)
    numbers = [torch.randint(0, count(dim, pulses), (*codes.shape[:2], 1), generator=rng) for codes in q.codes]
    return replace(q, codes=tuple(torch.cat([n, codes[..., 1:]], -1) for n, codes in zip(numbers, q.codes, strict=True)))


@needs_library
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize(("dim", "pulses", "gains"), [(8, 5, 2), (8, 20, 16), (16, 6, 8)])
def test_gains_and_shapes(isa, dim, pulses, gains, along):
    q = gain_shape_linear(dim, pulses, gains, along=along)
    assert_agrees(q, "voroq", torch.float32, torch.float32)
    packed = pack(q, torch.float16, "voroq")
    assert torch.equal(cpu.weight(packed, torch.float32), reference.weight(packed, torch.float32))


@needs_library
def test_every_vector_of_small_pyramids_is_spelled_out_like_the_reference(isa):
    for dim, pulses in ((8, (2, 3)), (16, (3, 1, 2))):
        book = Pyramids(dim, pulses, torch.rand(len(pulses)) + 0.5)
        codes = torch.arange(1 << book.bits)[None, :, None]
        band = Band(0, codes.shape[1], Tile(dim, 1), book)
        q = Quantized((dim, codes.shape[1]), random_transform(1, (), torch.Generator()), (band,), (codes,))
        packed = pack(q, torch.float32, "voroq")
        w = cpu.weight(packed, torch.float32)
        assert torch.equal(w, reference.weight(packed, torch.float32))
        assert w.unique(dim=1).shape[1] == 1 + sum(count(dim, k) for k in pulses)


@needs_library
def test_more_bands_than_are_held_at_once(isa):
    assert_agrees(random_gptq(19, 8 * 70 + 3, 1), "voroq", torch.float16, torch.float32)


@needs_library
@pytest.mark.parametrize("steps", [(), ("affine", "permute"), ("rows",)], ids="-".join)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decoded_weights_are_those_of_the_reference_bit_for_bit(isa, steps, dtype):
    for (v, sizes), outliers in zip(TABLES, cycle([(5, 4, 16), (5, 64, 2), (6, 40, 4)]), strict=False):
        packed = pack(random_vptq(43, 106, 2, v=v, sizes=sizes, outliers=outliers, steps=steps), torch.float16, "vptq")
        assert torch.equal(cpu.weight(packed, dtype), reference.weight(packed, dtype)), packed.spec
    for dim, pulses, spare in PYRAMIDS:
        book = random_pyramids(dim, pulses, spare, torch.Generator().manual_seed(1))
        packed = pack(pyramid_linear(dim, book, along=spare == 0), torch.float16, "voroq")
        assert torch.equal(cpu.weight(packed, dtype), reference.weight(packed, dtype)), packed.spec
    packed = pack(random_gptq(43, 105, 2, bits=3), torch.bfloat16, "voroq")
    assert torch.equal(cpu.weight(packed, dtype), reference.weight(packed, dtype))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    packed = pack(random_vptq(1000, 157, 5, v=6, sizes=(256, 16), outliers=(5, 4, 16), steps=("affine", "permute")), torch.float16, "vptq")
    for batch in BATCHES:
        x, found, before = rows(batch, 157).to(dtype), [], torch.get_num_threads()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                found.append(matmul(x, packed))
            finally:
                torch.set_num_threads(before)
        ours = dtype == torch.bfloat16 and native.isas()[0] == "avx512bf16"
        if batch <= cpu.FUSED or ours:  # panels go through torch, which promises nothing
            assert all(torch.equal(y, found[0]) for y in found)


@needs_library
def test_nothing_stored_is_changed_and_every_output_is_written(monkeypatch):
    packed = pack(random_vptq(43, 106, 2, v=6, sizes=(64, 16), outliers=(5, 4, 16), steps=("affine", "permute")), torch.float16, "vptq")
    before = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    for batch, dtype in product(BATCHES, TOLERANCE):
        assert matmul(rows(batch, 106).to(dtype), packed).isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.tensors.items())


@needs_library
def test_inputs_of_any_layout_and_shape():
    packed = pack(random_vptq(43, 106, 2, v=6, sizes=(64,)), torch.float16, "vptq")
    x = torch.randn(106, 3, 2).permute(2, 1, 0)
    torch.testing.assert_close(matmul(x, packed), reference.matmul(x, packed), rtol=1e-4, atol=1e-4)
    assert matmul(x[0, 0], packed).shape == (43,)
    assert matmul(x[:0], packed).shape == (0, 3, 43)


@needs_library
def test_a_permutation_that_leads_out_of_the_matrix_is_not_followed():
    packed = pack(random_vptq(43, 106, 2, steps=("permute",)), torch.float16, "vptq")
    packed.tensors["perm"][3] = 106
    with pytest.raises(native.Failed):
        matmul(rows(1, 106), packed)


@needs_library
@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_long_outliers_in_integers_of_both_kinds_and_outside_of_their_table(isa, kind):
    """Codes too large are read as others inside, as everywhere."""
    packed = pack(random_vptq(150, 106, 2, outliers=(5, 64, 4), steps=("permute",)), torch.float16, "vptq")
    x, wanted = rows(3, 106), matmul(rows(3, 106), packed)
    codes = packed.tensors["outlier_indices"].to(kind)
    for moved in (codes, codes + 4, codes - 4):
        again = matmul(x, Packed(packed.spec, {**packed.tensors, "outlier_indices": moved}))
        assert torch.equal(again, wanted)


@needs_library
def test_what_the_library_lacks_is_left_to_the_reference():
    rng = torch.Generator().manual_seed(0)
    books = [random_pyramids(dim, pulses, 0, rng) for dim, pulses in ((24, (3, 4)), (8, (9, 128)))]
    pyramids = [random_band(0, 8, Tile(book.dim, 1), book, 48, rng) for book in books]
    for q in (
        *(Quantized((48, 8), random_transform(8, (), rng), (band,), (codes,)) for band, codes in pyramids),
        random_vptq(43, 106, 2, v=24, sizes=(16,)),
        random_vptq(43, 106, 2, outliers=(6, 21, 8)),  # no power of two makes these short
    ):
        packed = pack(q, torch.float16, "vptq" if q.bands[0].stop == 6 else "voroq")
        assert pick(packed.spec, rows(1, q.shape[1])) == "reference"
    packed = pack(random_vptq(43, 106, 2), torch.float16, "vptq")
    assert pick(packed.spec, rows(1, 106).double()) == "reference"
    assert pick(packed.spec, rows(1, 106).to("meta")) == "reference"


def test_a_kernel_can_be_forced(monkeypatch):
    packed = pack(random_vptq(43, 106, 2), torch.float16, "vptq")
    monkeypatch.setenv("VOROQ_KERNEL", "reference")
    assert pick(packed.spec, rows(1, 106)) == "reference"
    assert torch.equal(matmul(rows(1, 106), packed), reference.matmul(rows(1, 106), packed))
    monkeypatch.setenv("VOROQ_KERNEL", "cpu")
    with pytest.raises(VoroqError, match=r"=cpu cannot multiply a vptq layout of 43 x 106 weights with inputs of torch.float64"):
        pick(packed.spec, rows(1, 106).double())
    monkeypatch.setenv("VOROQ_KERNEL", "gpu")
    with pytest.raises(VoroqError, match=r"VOROQ_KERNEL='gpu' is unknown; choose one of cpu, triton, reference"):
        pick(packed.spec, rows(1, 106))


def test_without_the_library_the_reference_multiplies(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert pick(pack(random_vptq(43, 106, 2), torch.float16, "vptq").spec, rows(1, 106)) == "reference"
    assert list(KERNELS)[-1] == "reference"


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_is_that_of_the_dense_product(kernel, monkeypatch):
    packed = pack(random_vptq(43, 106, 2, steps=("affine", "permute")), torch.float32, "vptq")
    if kernel == "cpu" and native.library() is None:
        pytest.skip(native.problem())
    monkeypatch.setenv("VOROQ_KERNEL", kernel)
    x, above = rows(3, 106).requires_grad_(), torch.randn(3, 43)
    (matmul(x, packed) * above).sum().backward()
    torch.testing.assert_close(x.grad, above @ unpack(packed).dequantize(), rtol=1e-4, atol=1e-4)


def test_the_operator_is_one_step_of_a_graph():
    packed = pack(random_vptq(43, 106, 2), torch.float32, "vptq")
    tensors = [packed.tensors[s.name] for s in packed.spec.layout()]
    checks = torch.library.opcheck(torch.ops.voroq.linear, (rows(3, 106).requires_grad_(), tensors, key_of(packed.spec)))
    assert set(checks.values()) == {"SUCCESS"}


COMPILED = """
import torch
from voroq.layer import QuantLinear
from voroq.layer import QuantLinear
from voroq.packed.base import Packed
from voroq.packed.conftest import random_vptq
from voroq.packed.format import pack

layer = QuantLinear.holding(pack(random_vptq(43, 106, 2), torch.float32, "vptq"), torch.arange(43.0))
graphs, x = [], torch.randn(3, 106)
compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
assert torch.equal(compiled(x), layer(x))
assert [n.target for n in graphs[0].graph.nodes if "voroq" in str(n.target)] == [torch.ops.voroq.linear]
"""


def test_a_layer_compiles_into_one_graph():
    """In a process of its own, without the checks of shapes that the suite wraps around every function."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_key_is_the_spec():
    linears = [random_vptq(43, 106, 2, v=v, outliers=(6, 3, 8), steps=steps) for v in (2, 4) for steps in ((), ("rows",))]
    specs = [pack(q, torch.float32, "vptq").spec for q in linears]
    specs += [replace(specs[0], perm=True), pack(random_gptq(43, 105, 2), torch.float32, "voroq").spec]
    specs += [OldSpec(specs[0], unpacked, floats) for unpacked, floats in ((True, False), (True, True), (False, True))]
    assert [described(key_of(spec))[0] for spec in specs] == specs
    assert len({key_of(spec) for spec in specs}) == len(specs)


LOADED = """
import sys, torch
layer, x, y = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(layer(x), y)
"""


def test_a_layer_that_was_saved_whole_works_in_another_process(tmp_path):
    layer, x = QuantLinear.holding(pack(random_vptq(43, 106, 2), torch.float32, "vptq")), rows(1, 106)
    torch.save((layer, x, layer(x)), tmp_path / "layer.pt")
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "layer.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
