"""The worked examples of docs/format.md, byte by byte, written out by hand."""

import struct

import torch

from voroq.packed.base import Packed, as_int16, from_int16
from voroq.packed.format import code_bytes, pack, total_bytes, unpack
from voroq.packed.native_format import NativeSpec
from voroq.packed.vptq_format import VptqSpec

# 3 x 15, one outlier column, two groups of 7 columns, vectors of 2 (the last row of vectors is half padding), 3 + 2 bits
VPTQ_JSON = {
    "in_features": 15,
    "out_features": 3,
    "vector_lens": [3, 2],
    "num_centroids": [4, 8],
    "num_res_centroids": [-1, 4],
    "group_num": 2,
    "group_size": 7,
    "outlier_size": 1,
    "enable_norm": True,
    "enable_perm": True,
    "is_indice_packed": True,
    "indices_as_float": False,
    "bias": True,
}
VPTQ_INDICES = bytes.fromhex("20C94D9A 05000000  FFFFFFFF 07000000  01000000 00000000  000000C0 01000000")
VPTQ_PERM = bytes.fromhex("0E00 0D00 0C00 0B00 0A00 0900 0800 0700 0600 0500 0400 0300 0200 0100 0000")
VPTQ_OUTLIERS = bytes.fromhex("0200")

NATIVE_JSON = {
    "shape": [2, 12],
    "transform": [{"kind": "permute"}],
    "bands": [{"count": 1, "columns": 12, "tile": [1, 1], "codebook": {"kind": "grid", "bits": 3}, "scale": True, "zero": True}],
}
NATIVE_CODES = bytes.fromhex("88C6FA88 06000000  00000000 00000000")
NATIVE_ZEROS = bytes.fromhex("15000000")


def from_bytes(data: bytes, letter: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = struct.calcsize(letter)
    return torch.tensor(struct.unpack(f"<{len(data) // size}{letter}", data), dtype=dtype).reshape(shape)


def vptq_tensors() -> dict[str, torch.Tensor]:
    half = torch.float16
    main = [[x for j in range(8) for x in (j, j / 2)], [x for j in range(8) for x in (-j, j + 8)]]
    residual = [[x for j in range(4) for x in (j / 4, 0)], [x for j in range(4) for x in (0, j / 4)]]
    outlier = [[x for j in range(4) for x in (j, j + 10, j + 20)]]
    return {
        "centroids.weight": torch.tensor(main, dtype=half),
        "res_centroids.weight": torch.tensor(residual, dtype=half),
        "outlier_centroids.weight": torch.tensor(outlier, dtype=half),
        "indices": from_bytes(VPTQ_INDICES, "i", torch.int32, 2, 2, 2),
        "outlier_indices": from_bytes(VPTQ_OUTLIERS, "h", torch.int16, 1, 1, 1),
        "perm": from_bytes(VPTQ_PERM, "h", torch.int16, 15),
        "weight_scale": torch.tensor([1.0] + [2.0] * 14).to(half),
        "weight_bias": torch.tensor([0.0] * 3 + [1.0] + [0.0] * 11).to(half),
    }


def test_a_vptq_layer_means_what_the_specification_says():
    spec = VptqSpec.from_json(VPTQ_JSON, "q_proj")
    tensors = vptq_tensors()
    assert {stored.name: (stored.shape, stored.dtypes[0]) for stored in spec.layout()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    q = unpack(Packed(spec, tensors))
    assert q.codes[1][0].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 0], [5, 1], [6, 2]]  # code 6 straddles two words
    assert q.codes[1][1].tolist() == [[7, 3]] * 7
    assert q.codes[2][:, :, 0].tolist() == [[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 7]]
    w = q.dequantize()
    assert w[:, 14].tolist() == [4, 24, 44]  # the outlier: 2 * (2, 12, 22)
    assert w[:, 12].tolist() == [2.5, 1.0, 15.5]  # stored column 2, group 0: 2 * (1 + 1/4, 1/2), 2 * (7 + 3/4)
    assert w[:, 3].tolist() == [1, 17, 1]  # stored column 11, group 1: 2 * (0, 8, 0) + 1
    assert w[:, 0].tolist() == [0, 8, -7]  # stored column 14, group 1: 1 * (0, 8, -7)


def test_packing_a_vptq_layer_gives_the_same_bytes():
    spec = VptqSpec.from_json(VPTQ_JSON, "q_proj")
    packed = pack(unpack(Packed(spec, vptq_tensors())), torch.float16, "vptq")
    assert packed.spec == spec
    assert packed.spec.to_json(bias=True) == VPTQ_JSON
    assert list(packed.spec.to_json(bias=True)) == list(VPTQ_JSON)
    assert packed.tensors["indices"].numpy().tobytes() == VPTQ_INDICES
    assert packed.tensors["perm"].numpy().tobytes() == VPTQ_PERM
    assert packed.tensors["outlier_indices"].numpy().tobytes() == VPTQ_OUTLIERS
    for name, tensor in vptq_tensors().items():
        assert packed.tensors[name].dtype == tensor.dtype and torch.equal(packed.tensors[name], tensor), name
    assert total_bytes(packed) == 32 + 2 + 30 + 2 * (32 + 16 + 12 + 15 + 15)
    assert code_bytes(packed) == 32 + 2


def test_a_permutation_may_be_int64_and_large_numbers_are_unsigned():
    spec = VptqSpec.from_json(VPTQ_JSON, "q_proj")
    wide = vptq_tensors() | {"perm": torch.arange(14, -1, -1)}
    assert torch.equal(unpack(Packed(spec, wide)).dequantize(), unpack(Packed(spec, vptq_tensors())).dequantize())
    numbers = torch.tensor([0, 32767, 32768, 65535])
    assert as_int16(numbers).tolist() == [0, 32767, -32768, -1]
    assert torch.equal(from_int16(as_int16(numbers)), numbers)


def test_a_native_layer_means_what_the_specification_says():
    spec = NativeSpec.from_json(NATIVE_JSON, "q_proj")
    tensors = {
        "weight_codes": from_bytes(NATIVE_CODES, "i", torch.int32, 2, 2),
        "weight_scales": torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        "weight_zeros": from_bytes(NATIVE_ZEROS, "i", torch.int32, 1, 1),
        "weight_perm": torch.tensor([1, 0, *range(2, 12)], dtype=torch.int16),
    }
    q = unpack(Packed(spec, tensors))
    assert q.codes[0][0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]  # codes 10 and 11: the word boundary is inside 10
    assert q.bands[0].zero.tolist() == [5, 2]
    w = q.dequantize()
    assert w[0].tolist() == [-2, -2.5, -1.5, -1, -0.5, 0, 0.5, 1, -2.5, -2, -1.5, -1]  # 0.5 * (code - 5), columns 0 and 1 swapped
    assert w[1].tolist() == [-4] * 12
    packed = pack(q, torch.float16, "voroq")
    assert packed.spec == spec and packed.spec.to_json() == NATIVE_JSON
    assert packed.tensors["weight_codes"].numpy().tobytes() == NATIVE_CODES
    assert packed.tensors["weight_zeros"].numpy().tobytes() == NATIVE_ZEROS
    assert torch.equal(packed.tensors["weight_perm"], tensors["weight_perm"])


PYRAMIDS_JSON = {
    "shape": [3, 5],
    "transform": [{"kind": "rotate_in"}],
    "bands": [
        {
            "count": 1,
            "columns": 5,
            "tile": [4, 1],
            "codebook": {"kind": "pyramids", "dim": 4, "bits": 7, "pulses": [2, 3], "order": "split-v1"},
            "scale": True,
            "zero": False,
        }
    ],
}


def test_a_layer_of_pyramids_means_what_the_specification_says_and_packs_to_the_same_bytes():
    tensors = {
        "weight_codes": from_bytes(bytes.fromhex("910FF68E 07000000"), "i", torch.int32, 1, 2),
        "weight_tables": torch.tensor([[[0.5], [0.25]]], dtype=torch.float16),
        "weight_scales": torch.tensor([[2.0]], dtype=torch.float16),
        "weight_signs_in": from_bytes(bytes.fromhex("12000000"), "i", torch.int32, 1),
    }
    spec = NativeSpec.from_json(PYRAMIDS_JSON, "m", (3, 5))
    q = unpack(Packed(spec, tensors))
    assert q.dequantize().tolist() == [[1, 2, 0.5, -1.5, 0], [0, 0, -0.5, 0, 0], [0, 0, 0, 0, 0]]
    again = pack(q, torch.float16, "voroq")
    assert again.spec == spec and again.spec.to_json() == PYRAMIDS_JSON
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())


def test_the_same_layer_spelled_out_is_what_the_specification_says():
    codebook = {"kind": "pulses", "dim": 4, "pulses": [2, 3], "entry": 4}
    data = {**PYRAMIDS_JSON, "bands": [{**PYRAMIDS_JSON["bands"][0], "codebook": codebook}]}
    tensors = {
        "weight_codes": from_bytes(bytes.fromhex("50020000"), "i", torch.int32, 1, 1),
        "weight_pulses": from_bytes(bytes.fromhex("01F00E00011F0D000000"), "b", torch.int8, 1, 1, 10),
        "weight_tables": torch.tensor([[[0.5], [0.25]]], dtype=torch.float16),
        "weight_scales": torch.tensor([[2.0]], dtype=torch.float16),
        "weight_signs_in": from_bytes(bytes.fromhex("12000000"), "i", torch.int32, 1),
    }
    spec = NativeSpec.from_json(data, "m", (3, 5))
    q = unpack(Packed(spec, tensors))
    assert q.dequantize().tolist() == [[1, 2, 0.5, -1.5, 0], [0, 0, -0.5, 0, 0], [0, 0, 0, 0, 0]]
    again = spec.pack(q, torch.float16)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
