"""Older VPTQ layouts, written out by hand from docs/format.md, 2.5; and the laws of what makes current ones of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voroq.errors import FormatError
from voroq.packed.base import Packed
from voroq.packed.checkpoint import check_packed
from voroq.packed.conftest import assert_same, random_vptq
from voroq.packed.format import LAYOUTS, pack, spec_from_json, unpack
from voroq.packed.format_test import DTYPES, vptq_linears
from voroq.packed.golden_test import VPTQ_INDICES, VPTQ_JSON, VPTQ_OUTLIERS, VPTQ_PERM, from_bytes, vptq_tensors
from voroq.packed.legacy import OldSpec, modern, vptq_from_json
from voroq.packed.rewrite import absorb_permutation, larger_table_first
from voroq.packed.vptq_format import VptqSpec
from voroq.quantized import narrow

# the worked example of docs/format.md, 2.4, with one 16-bit number for each code: groups 0 and 1, rows 0 and 1 of each
MAIN = bytes.fromhex(
    "0000 0100 0200 0300 0400 0500 0600  0700 0700 0700 0700 0700 0700 0700"
    "0100 0000 0000 0000 0000 0000 0000  0000 0000 0000 0000 0000 0000 0700"
)
RESIDUAL = bytes.fromhex("0000 0100 0200 0300 0000 0100 0200  0300 0300 0300 0300 0300 0300 0300" + "0000" * 14)
UNPACKED = VPTQ_JSON | {"is_indice_packed": False, "indices_as_float": None}


def unpacked_tensors() -> dict[str, torch.Tensor]:
    codes = {"indices": from_bytes(MAIN, "h", torch.int16, 2, 2, 7), "res_indices": from_bytes(RESIDUAL, "h", torch.int16, 2, 2, 7)}
    return vptq_tensors() | codes | {"perm": torch.arange(14, -1, -1)}


def as_floats(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {name: t.view(torch.float16) for name, t in tensors.items() if name.endswith("indices") and t.dtype == torch.int16}


def as_unsigned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {name: t.view(torch.uint16) for name, t in tensors.items() if name.endswith("indices")}


VARIANTS = {
    "int16": (UNPACKED, unpacked_tensors),
    "uint16": (UNPACKED, lambda: as_unsigned(unpacked_tensors())),
    "int16 permutation": (UNPACKED, lambda: unpacked_tensors() | {"perm": vptq_tensors()["perm"]}),
    "float16": (UNPACKED | {"indices_as_float": True}, lambda: as_floats(unpacked_tensors())),
    "packed, outliers as float16": (VPTQ_JSON | {"indices_as_float": True}, lambda: as_floats(vptq_tensors())),
    "packed, wide integers": (
        VPTQ_JSON,
        lambda: vptq_tensors() | {name: vptq_tensors()[name].int() for name in ("perm", "outlier_indices")},
    ),
    "bias left open": (VPTQ_JSON | {"bias": None, "norm_dim": 0, "enable_proxy_error": False}, vptq_tensors),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_older_layout_becomes_the_current_one_byte_for_byte(variant):
    data, make = VARIANTS[variant]
    spec = vptq_from_json(data, "q_proj", (3, 15))
    packed = Packed(spec, make())
    check_packed("q_proj", packed)
    assert_same(unpack(packed), unpack(Packed(VptqSpec.from_json(VPTQ_JSON, "q_proj"), vptq_tensors())))
    new = modern(packed)
    assert new.spec == VptqSpec.from_json(VPTQ_JSON, "q_proj") and modern(new) is new
    assert new.tensors["indices"].numpy().tobytes() == VPTQ_INDICES
    assert new.tensors["outlier_indices"].numpy().tobytes() == VPTQ_OUTLIERS
    assert new.tensors["perm"].numpy().tobytes() == VPTQ_PERM
    for name, tensor in vptq_tensors().items():
        assert new.tensors[name].dtype == tensor.dtype and torch.equal(new.tensors[name], tensor), name
    if isinstance(spec, OldSpec):
        assert spec.to_json(bias=True) == data | {"indices_as_float": bool(data["indices_as_float"])}


def test_the_largest_code_survives_as_a_negative_number_and_as_a_float_that_is_none():
    """0xFFFE is -2 as int16 and NaN as float16; W[0] picks row 65534 of a table of 65536."""
    data = {"in_features": 2, "out_features": 1, "vector_lens": [-1, 1], "num_centroids": [-1, 65536], "num_res_centroids": [-1, -1]}
    data |= {"group_num": 1, "group_size": 2, "outlier_size": 0, "enable_norm": False, "enable_perm": False, "bias": False}
    table = torch.arange(65536, dtype=torch.float32)[None]
    codes = from_bytes(bytes.fromhex("FEFF 0180"), "h", torch.int16, 1, 1, 2)
    for floats in (False, True):
        spec = vptq_from_json(data | {"is_indice_packed": False, "indices_as_float": floats}, "m")
        indices = codes.view(torch.float16) if floats else codes
        packed = Packed(spec, {"centroids.weight": table, "indices": indices})
        check_packed("m", packed)
        assert unpack(packed).dequantize().tolist() == [[65534, 32769]]
        assert modern(packed).tensors["indices"].numpy().tobytes() == bytes.fromhex("FEFF 0180")


def test_a_scale_and_shift_for_every_row():
    """Row o of the worked example without scales, times 1, 2, 4, plus 0, 1, -1."""
    spec = vptq_from_json(VPTQ_JSON | {"norm_dim": 1}, "m")
    rows = {"weight_scale": torch.tensor([1.0, 2.0, 4.0]).half(), "weight_bias": torch.tensor([0.0, 1.0, -1.0]).half()}
    packed = Packed(spec, vptq_tensors() | rows)
    check_packed("m", packed)
    w = unpack(packed).dequantize()
    assert w[:, 14].tolist() == [2, 25, 87]  # the outlier (2, 12, 22)
    assert w[:, 12].tolist() == [1.25, 2, 30]  # (1 + 1/4, 1/2, 7 + 3/4)
    assert w[:, 0].tolist() == [0, 17, -29]  # (0, 8, -7)
    assert spec.to_json(bias=True) == VPTQ_JSON | {"norm_dim": 1}
    again = pack(unpack(packed), torch.float16, "vptq")
    assert again.spec == spec and all(torch.equal(again.tensors[name], tensor) for name, tensor in packed.tensors.items())
    assert vptq_from_json(VPTQ_JSON | {"norm_dim": 1, "enable_norm": False}, "m").norm_dim == 0


def test_a_residual_table_larger_than_the_main_one():
    """Main 1 of 2 entries, residual 5 of 8: merged 1 | 5 << 1 = 0xB in the file, 5 | 1 << 3 = 0xD once the tables are swapped."""
    data = {"in_features": 8, "out_features": 2, "vector_lens": [-1, 2], "num_centroids": [-1, 2], "num_res_centroids": [-1, 8]}
    data |= {"group_num": 1, "group_size": 8, "outlier_size": 0, "enable_norm": False, "enable_perm": False, "bias": False}
    spec = vptq_from_json(data | {"is_indice_packed": True, "indices_as_float": False}, "m")
    tables = {
        "centroids.weight": torch.tensor([[0.0, 0, 1, 2]]),
        "res_centroids.weight": torch.tensor([[float(x) for j in range(8) for x in (10 * j, 0)]]),
    }
    packed = Packed(spec, tables | {"indices": from_bytes(bytes.fromhex("BBBBBBBB"), "i", torch.int32, 1, 1, 1)})
    assert unpack(packed).dequantize().tolist() == [[51] * 8, [2] * 8]
    swapped = larger_table_first(packed)
    assert (swapped.spec.k, swapped.spec.residual) == (8, 2)
    assert swapped.tensors["indices"].numpy().tobytes() == bytes.fromhex("DDDDDDDD")
    assert torch.equal(unpack(swapped).dequantize(), unpack(packed).dequantize())
    assert larger_table_first(swapped) is swapped


@given(vptq_linears(), st.booleans(), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=30)
def test_an_older_layout_holds_the_same_linear(q, floats, dtype):
    current = pack(q, dtype, "vptq")
    old = OldSpec(current.spec, True, floats)
    tensors = old.pack(narrow(q, dtype), dtype)
    assert {s.name: s.shape for s in old.layout()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert all(tensors[s.name].dtype == s.dtypes[0] for s in old.layout() if not s.real)
    check_packed("m", Packed(old, tensors))
    assert spec_from_json("vptq", old.to_json(), "m", q.shape) == old
    new = modern(Packed(old, tensors))
    assert new.spec == current.spec and new.tensors.keys() == current.tensors.keys()
    assert all(new.tensors[name].dtype == t.dtype and torch.equal(new.tensors[name], t) for name, t in current.tensors.items())


@given(vptq_linears(), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=30)
def test_absorbing_a_permutation_changes_no_bit_of_the_weight(q, dtype):
    packed = pack(q, dtype, "vptq")
    absorbed = absorb_permutation(packed)
    legal = packed.spec.perm and packed.spec.groups == 1 and packed.spec.outliers is None
    assert absorbed.spec == (replace(packed.spec, perm=False) if legal else packed.spec)
    assert ("perm" in absorbed.tensors) == absorbed.spec.perm
    assert torch.equal(unpack(absorbed).dequantize(), unpack(packed).dequantize())


def test_scales_of_rows_survive_packing_with_a_permutation():
    q = random_vptq(7, 20, 3, groups=2, outliers=(4, 2, 8), steps=("rows", "permute"))
    packed = pack(q, torch.bfloat16, "vptq")
    assert_same(unpack(packed), narrow(q, torch.bfloat16))
    assert LAYOUTS["vptq"].from_json(packed.spec.to_json(), "m", q.shape) == packed.spec
    with pytest.raises(FormatError, match="a RowAffine transform cannot be stored"):
        pack(q, torch.bfloat16, "voroq")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("indices", 8, "holds code 8, its table has 8"),
        ("res_indices", -1, "holds code 65535, its table has 4"),
        ("perm", 3, "is not a permutation"),
    ],
)
def test_codes_outside_their_tables_are_named(name, value, message):
    tensors = unpacked_tensors()
    tensors[name] = tensors[name].clone().fill_(value)
    with pytest.raises(FormatError, match=f"tensor m.{name} {message}"):
        check_packed("m", Packed(vptq_from_json(UNPACKED, "m"), tensors))
    wide = vptq_tensors() | {"outlier_indices": torch.tensor([[[-1]]], dtype=torch.int32)}
    with pytest.raises(FormatError, match=r"tensor m.outlier_indices holds code -1"):
        check_packed("m", Packed(vptq_from_json(VPTQ_JSON, "m"), wide))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vector_quant_dim": "in"}, "vector_quant_dim must be 'out'"),
        ({"indices_as_float": "yes"}, "indices_as_float"),
        ({"is_indice_packed": None}, "is_indice_packed"),
        ({"norm_dim": 2}, "norm_dim"),
    ],
)
def test_what_no_release_has_written_is_refused_by_name(change, field):
    with pytest.raises(FormatError, match=f"config of model.q_proj: {field}"):
        vptq_from_json(UNPACKED | change, "model.q_proj")
    floats = as_floats(unpacked_tensors())
    with pytest.raises(FormatError, match=r"tensor m.indices is float16, int16 or uint16 is needed"):
        check_packed("m", Packed(vptq_from_json(UNPACKED, "m"), floats))
