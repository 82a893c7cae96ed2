from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voroq.codebook.gain_shape import GainShape
from voroq.codebook.grid import Grid
from voroq.codebook.pyramid import Pulses
from voroq.codebook.table import Table
from voroq.errors import FormatError
from voroq.packed.conftest import assert_same, random_band, random_gptq, random_pyramids, random_table, random_transform, random_vptq
from voroq.packed.format import LAYOUTS, bits_per_weight, pack, spec_bytes, total_bytes, unpack
from voroq.packed.native_format import NativeSpec
from voroq.packed.vptq_format import VptqSpec
from voroq.quantized import Band, Quantized, Tile, narrow
from voroq.transform.chain import Chain

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@st.composite
def vptq_linears(draw):
    groups, size = draw(st.integers(1, 3)), draw(st.sampled_from([0, 0, 1, 5]))
    k = draw(st.sampled_from([2, 8, 16, 512]))
    sizes = (k,) if draw(st.booleans()) else (k, draw(st.sampled_from([n for n in (2, 4, 512) if n <= k])))
    least = -(-17 // sum(n.bit_length() - 1 for n in sizes))
    columns = size + groups * draw(st.integers(least, least + 8))
    steps = [step for step in ("affine", "permute") if draw(st.booleans())]
    return random_vptq(
        draw(st.integers(1, 13)),
        columns,
        draw(st.integers(0, 99)),
        v=draw(st.integers(1, 6)),
        sizes=sizes,
        groups=groups,
        outliers=(size, draw(st.integers(2, 5)), draw(st.sampled_from([2, 16]))),
        steps=steps,
    )


@st.composite
def native_linears(draw):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    out, at, bands = draw(st.integers(1, 9)), 0, []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["grid", "table", "residual", "pyramids", "gain_shape", "pulses"]))
        rows = draw(st.integers(1, 3)) if kind != "grid" else 1
        tile = Tile(rows, draw(st.integers(1, 3)) if kind != "grid" else 1) if kind != "pulses" else Tile(rows, 2)
        sizes = (8,) if kind == "table" else (8, 2, 4)
        if kind == "grid":
            codebook = Grid(draw(st.integers(1, 8)))
        elif kind == "pyramids":
            pulses = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
            codebook = random_pyramids(tile.size, pulses, draw(st.integers(0, 20)), rng)
            codebook = replace(codebook, order=draw(st.sampled_from(["split-v1", "class-v1"] if tile.size <= 8 else ["split-v1"])))
        elif kind == "pulses":
            codebook = Pulses(tile.size, (draw(st.integers(1, 63)),) * 3, torch.rand(3, generator=rng) + 0.1)
        elif kind == "gain_shape":
            codebook = GainShape(tile.size, draw(st.integers(1, 30)), torch.rand(4, generator=rng) + 0.1)
        else:
            codebook = random_table(sizes, tile.size, rng)
        scale = draw(st.booleans())
        for _ in range(draw(st.integers(1, 3))):
            stop = at + tile.cols * draw(st.sampled_from([2, 2, 3]))
            bands.append(random_band(at, stop, tile, codebook, out, rng, scale=scale, zero=kind == "grid" and draw(st.booleans())))
            at = stop
    kinds = ["affine", "permute", draw(st.sampled_from(["rotate_in", "rotate_both"]))]
    transform = random_transform(at, tuple(draw(st.lists(st.sampled_from(kinds), unique=True))), rng, out)
    return Quantized((out, at), transform, tuple(band for band, _ in bands), tuple(codes for _, codes in bands))


def check_round_trip(q: Quantized, layout: str, dtype: torch.dtype) -> None:
    packed = pack(q, dtype, layout)
    assert_same(unpack(packed), narrow(q, dtype))
    assert {s.name: s.shape for s in packed.spec.layout()} == {name: tuple(t.shape) for name, t in packed.tensors.items()}
    assert all(packed.tensors[s.name].dtype == (dtype if s.real else s.dtypes[0]) for s in packed.spec.layout())
    assert LAYOUTS[layout].from_json(packed.spec.to_json(), "m", q.shape) == packed.spec
    assert total_bytes(packed) == spec_bytes(packed.spec, dtype)


@given(vptq_linears(), st.sampled_from(["vptq", "voroq"]), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=40)
def test_unpacking_inverts_packing_of_vptq_linears(q, layout, dtype):
    check_round_trip(q, layout, dtype)


@given(native_linears(), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=40)
def test_unpacking_inverts_packing_of_any_bands(q, dtype):
    check_round_trip(q, "voroq", dtype)


def dequantize_literally(spec: VptqSpec, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The official dequantisation, step by step over single bits and numbers."""
    out, columns = spec.shape
    main_bits = spec.k.bit_length() - 1
    bits = main_bits + (spec.residual.bit_length() - 1 if spec.residual else 0)
    v, g = spec.vector, spec.group_size
    stored = torch.zeros(out, columns)
    first = spec.outliers.columns if spec.outliers else 0
    for c in range(first):
        for row in range(out):
            v0 = spec.outliers.vector
            code = tensors["outlier_indices"][0, row // v0, c].item() % 65536
            stored[row, c] = tensors["outlier_centroids.weight"][0, code * v0 + row % v0]
    for t in range(spec.groups):
        for c in range(g):
            for row in range(out):
                words = [word % 2**32 for word in tensors["indices"][t, row // v].tolist()]
                code = sum((words[n // 32] >> n % 32 & 1) << i for i, n in enumerate(range(c * bits, c * bits + bits)))
                main, residual = code % spec.k, code >> main_bits
                value = tensors["centroids.weight"][t, main * v + row % v].float()
                if spec.residual:
                    value = value + tensors["res_centroids.weight"][t, residual * v + row % v].float()
                stored[row, first + t * g + c] = value
    w = torch.zeros(out, columns)
    for p in range(columns):
        w[:, tensors["perm"][p].item() % 65536 if spec.perm else p] = stored[:, p]
    if spec.norm:
        w = w * tensors["weight_scale"].float() + tensors["weight_bias"].float()
    return w


@given(vptq_linears())
@settings(deadline=None, max_examples=15)
def test_dequantisation_agrees_with_the_literal_one(q):
    packed = pack(q, torch.bfloat16, "vptq")
    assert torch.equal(unpack(packed).dequantize(), dequantize_literally(packed.spec, dict(packed.tensors)))


def test_gptq_costs_its_codes_scales_zeros_and_permutation():
    q = random_gptq(64, 256, 0, bits=3, group=128)
    assert bits_per_weight(pack(q, torch.bfloat16, "voroq")) == 3 + (16 + 3) / 128 + 16 / 64
    assert NativeSpec.of(q).to_json()["bands"][0]["count"] == 2


def test_a_narrower_last_group_is_a_run_of_its_own():
    spec = NativeSpec.of(random_gptq(4, 20, 0, group=8))
    assert [(run.count, run.columns) for run in spec.runs] == [(2, 8), (1, 4)]
    assert [s.name for s in spec.layout() if s.name.startswith("weight_codes")] == ["weight_codes", "weight_codes_1"]


def swapped(q: Quantized) -> Quantized:
    return replace(q, transform=Chain(q.transform.steps[::-1]))


@pytest.mark.parametrize(
    ("make", "layout", "message"),
    [
        (lambda: random_gptq(8, 16, 0), "vptq", "without scale and zero"),
        (lambda: swapped(random_vptq(8, 16, 0, steps=("affine", "permute"))), "vptq", "holds scales, then a Permute"),
        (lambda: random_vptq(8, 16, 0, sizes=(4, 8)), "vptq", "residual table larger"),
        (lambda: random_vptq(8, 16, 0, sizes=(4, 4, 4)), "vptq", "two-stage residual"),
        (lambda: random_vptq(8, 16, 0, outliers=(3, 1, 4)), "vptq", "vectors of at least 2"),
        (lambda: random_vptq(8, 18, 0, groups=4), "vptq", "equal width"),
        (lambda: random_gptq(8, 16, 0), "aqlm", "unknown layout 'aqlm'"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_with_the_reason(make, layout, message):
    with pytest.raises(FormatError, match=message):
        pack(make(), torch.bfloat16, layout)


def test_zero_points_that_are_no_codes_are_refused():
    q = random_gptq(8, 16, 0)
    bands = (replace(q.bands[0], zero=q.bands[0].zero + 0.5), *q.bands[1:])
    with pytest.raises(FormatError, match="integers from 0 to 7"):
        pack(replace(q, bands=bands), torch.bfloat16, "voroq")


def test_a_value_that_overflows_the_dtype_is_refused():
    band = Band(0, 20, Tile(2, 1), Table(torch.full((2, 2), 1e6)))
    q = Quantized((2, 20), Chain(), (band,), (torch.zeros(1, 20, 1, dtype=torch.long),))
    with pytest.raises(ValueError, match="does not fit in"):
        pack(q, torch.float16, "vptq")


def test_rows_that_the_official_reader_misreads_are_not_written():
    assert VptqSpec.of(random_vptq(8, 17, 0, sizes=(2,))).group_size == 17
    for columns, sizes in [(16, (2,)), (8, (4,)), (4, (8, 2))]:
        with pytest.raises(FormatError, match="under 17 bits"):
            VptqSpec.of(random_vptq(8, columns, 0, sizes=sizes))


VPTQ = VptqSpec.of(random_vptq(8, 20, 0, groups=2, outliers=(4, 2, 8), steps=("affine", "permute"))).to_json()
NATIVE = NativeSpec.of(random_gptq(8, 20, 0)).to_json()
RUN = NATIVE["bands"][0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vector_lens": [2, 65]}, "vector_lens"),
        ({"vector_lens": [2, 0]}, "vector_lens"),
        ({"vector_lens": "8"}, "vector_lens"),
        ({"num_centroids": [8, 100]}, "num_centroids"),
        ({"num_centroids": [8, 1 << 17]}, "num_centroids"),
        ({"num_centroids": [8, True]}, "num_centroids"),
        ({"num_res_centroids": [4, 4]}, "num_res_centroids"),
        ({"group_num": 0}, "group_num"),
        ({"group_size": 9}, "group_size"),
        ({"outlier_size": 0}, "group_size"),
        ({"outlier_size": 0, "group_size": 10}, "outlier_size"),
        ({"in_features": 1 << 40}, "in_features"),
        ({"is_indice_packed": False}, "is_indice_packed"),
        ({"indices_as_float": True}, "indices_as_float"),
        ({"norm_dim": 2}, "norm_dim"),
        ({"vector_quant_dim": "in"}, "vector_quant_dim"),
        ({"enable_perm": None}, "enable_perm"),
        ({"bias": "yes"}, "bias"),
        ({"new_field": 1}, "new_field"),
        ({"out_features": 9}, "out_features"),
    ],
)
def test_a_hostile_vptq_config_is_refused_by_field_and_module(change, field):
    with pytest.raises(FormatError, match=f"model.layers.0.q_proj: .*{field}"):
        VptqSpec.from_json(VPTQ | change, "model.layers.0.q_proj", (8, 20))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"shape": [8]}, "shape"),
        ({"shape": [8, 21]}, "shape"),
        ({"transform": [{"kind": "rotate"}]}, "kind"),
        ({"transform": [{"kind": "permute"}] * 2}, "transform"),
        ({"bands": [RUN | {"count": 3}]}, "bands must cover 20 columns, got 24"),
        ({"bands": [RUN | {"count": 1 << 30}]}, "count"),
        ({"bands": [RUN] * 21}, "bands"),
        ({"bands": [RUN | {"tile": [2, 1]}]}, "tile"),
        ({"bands": [RUN | {"codebook": {"kind": "grid", "bits": 9}}]}, "bits"),
        ({"bands": [RUN | {"codebook": {"kind": "table", "k": 256}}]}, "zero"),
        ({"bands": [RUN | {"codebook": {"kind": "trellis"}}]}, "kind"),
        ({"bands": [RUN | {"codebook": {"kind": "residual", "k": [65536, 65536, 2]}}]}, "k must be"),
        ({"bands": [RUN | {"scale": 1}]}, "scale"),
        ({"version": 2}, "version"),
    ],
)
def test_a_hostile_native_config_is_refused_by_field_and_module(change, field):
    with pytest.raises(FormatError, match=f"layers.0.q_proj.*{field}"):
        NativeSpec.from_json(NATIVE | change, "layers.0.q_proj", (8, 20))


def test_a_config_that_asks_for_absurd_memory_is_refused():
    run = {"count": 1 << 20, "columns": 1, "tile": [64, 1], "codebook": {"kind": "table", "k": 65536}, "scale": False, "zero": False}
    with pytest.raises(FormatError, match="weight_tables would have shape"):
        NativeSpec.from_json({"shape": [64, 1 << 20], "transform": [], "bands": [run]}, "m")

