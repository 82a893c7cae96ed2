"""A folder as GPTQModel 7.7 writes it, from its layout as docs/format.md, 2.6 describes it."""

import json

import pytest
import torch

from voroq.errors import FormatError
from voroq.packed.base import Packed
from voroq.packed.checkpoint import open_folder, specs_from_config
from voroq.packed.conftest import GPTQMODEL, random_vptq
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.format import pack, unpack
from voroq.packed.golden_test import VPTQ_JSON, vptq_tensors
from voroq.packed.legacy import modern
from voroq.packed.vptq_format import Outliers, VptqSpec


def test_the_worked_example_in_gptqmodels_words():
    """15 columns: 5 % are one outlier column, the other 14 make two groups of 7. Codes of outliers and permutation are int32."""
    table = specs_from_config(GPTQMODEL).naming(["a.q_proj.centroids.weight", "a.q_proj.indices", "b.weight"])
    assert table.names == ("a.q_proj",)
    spec = table.lookup("a.q_proj", (3, 15))
    assert spec == VptqSpec.from_json(VPTQ_JSON, "m")
    assert table.lookup("b", (3, 15)) is None
    wide = vptq_tensors() | {name: vptq_tensors()[name].int() for name in ("perm", "outlier_indices")}
    new = modern(Packed(spec, wide))
    assert all(new.tensors[name].dtype == t.dtype and torch.equal(new.tensors[name], t) for name, t in vptq_tensors().items())


@pytest.mark.parametrize(
    ("columns", "change", "expected"),
    [
        (20, {"npercent": 0.0, "group_num": -1}, (0, 1, 20)),
        (20, {"npercent": 0.0, "group_num": -1, "group_size": 5}, (0, 4, 5)),
        (20, {"npercent": 12.0, "group_num": 4}, (4, 4, 4)),  # 3 columns are 12 % rounded up, and one more does not divide
        (20, {"npercent": 12.0, "group_num": -1}, (3, 1, 17)),
        (20, {"npercent": 0.0, "group_num": 3}, "20 columns do not divide into 3 groups of 7"),
        (20, {"npercent": 0.0, "group_num": -1, "group_size": 8}, "20 columns do not divide into 3 groups of 8"),
    ],
)
def test_groups_follow_from_the_columns(columns, change, expected):
    table = specs_from_config(GPTQMODEL | change).naming(["m.centroids.weight"])
    if isinstance(expected, str):
        with pytest.raises(FormatError, match=f"config of m: {expected}; GPTQModel pads"):
            table.lookup("m", (8, columns))
        return
    outliers, groups, size = expected
    spec = table.lookup("m", (8, columns))
    assert (spec.outliers, spec.groups, spec.group_size) == (Outliers(outliers, 3, 4) if outliers else None, groups, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotation": "hadamard"}, "rotation must be None"),
        ({"pack_dtype": "int16"}, "pack_dtype must be 'int32'"),
        ({"format": "gptq"}, "format"),
        ({"npercent": "5"}, "npercent must be a percentage"),
        ({"group_num": 0.5}, "group_num must be an integer"),
        ({"group_num": 2, "group_size": 8}, "group_size must be -1, or the only one"),
        ({"group_num": 0}, "group_num must be -1, or the only one"),
        ({"dynamic": {"a": {"vector_lens": [-1, 4]}}}, "settings of single linears"),
        ({"smooth_quant": 1}, "unknown field 'smooth_quant'"),
    ],
)
def test_what_is_not_known_of_gptqmodel_is_refused(change, message):
    with pytest.raises(FormatError, match=message):
        specs_from_config(GPTQMODEL | change)
    specs_from_config(GPTQMODEL | {"dynamic": {"-:lm_head": {}, "x": False}})


def test_a_folder_is_read_once_the_shapes_are_known(tmp_path):
    q = random_vptq(8, 20, 0, sizes=(8, 4), v=2, groups=2, outliers=(2, 3, 4), steps=("affine", "permute"))
    packed = pack(q, torch.float16, "vptq")
    wide = {name: t.int() if name in ("perm", "outlier_indices") else t for name, t in packed.tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", [Entry.of(f"a.b.{name}", t) for name, t in wide.items()], {})
    write_json(tmp_path / "config.json", {"quantization_config": GPTQMODEL | {"npercent": 10}})
    folder = open_folder(tmp_path)
    assert folder.names() == ["a.b"] and folder.specs.lacks_shape("a.b")
    with pytest.raises(FormatError, match=r"the shape of a.b is needed"):
        folder.sites()
    folder = type(folder)(folder.path, json.loads((tmp_path / "config.json").read_text()), folder.specs, folder.tensors, {"a.b": (8, 20)})
    assert torch.equal(unpack(folder.packed("a.b")).dequantize(), unpack(packed).dequantize())
