"""Each kind of damage, planted alone, is found and named; all of them together are all found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import voroq
from voroq.cli.cli_test import run
from voroq.convert import convert
from voroq.errors import FormatError, VoroqError
from voroq.integrations.conftest import make_old, tiny, write_gptqmodel, write_model
from voroq.packed.conftest import rewrite
from voroq.packed.files import write_json
from voroq.report.verify import verify_folder

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    """A folder that we wrote: with hashes, in several shards."""
    write_model(tmp_path / "source", "llama", "vptq")
    convert(tmp_path / "source", tmp_path / "m", absorb=False, shard_bytes=5_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    return tmp_path / "m"


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def tensor(name: str, change: Callable) -> Callable:
    """Damage one tensor where it lies; `change` gives the new one, or None to take it out."""

    def damage(folder):
        def act(tensors):
            new = change(tensors.pop(name))
            if new is not None:
                tensors[name] = new

        rewrite(folder, act, shard_of(folder, name).name)

    return damage


def edited(file: str, change: Callable) -> Callable:
    def damage(folder):
        value = json.loads((folder / file).read_text())
        change(value)
        write_json(folder / file, value)

    return damage


def layers(value):
    return value["quantization_config"]["config_for_layers"]


INDEX = "model.safetensors.index.json"
STALE = torch.ones(32, 32, dtype=torch.bfloat16)
DAMAGE = {
    "nan in a table": (tensor(f"{Q}.centroids.weight", lambda t: t.fill_(float("nan"))), "values", f"{Q}.centroids.weight holds NaN"),
    "nan elsewhere": (tensor("model.norm.weight", lambda t: t.fill_(float("inf"))), "values", "model.norm.weight holds NaN or infinity"),
    "code": (tensor(f"{Q}.outlier_indices", lambda t: t.fill_(-1)), "values", f"{Q}.outlier_indices holds code 65535"),
    "permutation": (tensor(f"{Q}.perm", lambda t: t.fill_(1)), "values", f"{Q}.perm is not a permutation"),
    "dtype": (tensor(f"{Q}.indices", lambda t: t.float()), "structure", f"{Q}.indices is float32, int32 is needed"),
    "shape": (tensor(f"{Q}.weight_scale", lambda t: t[1:]), "structure", f"{Q}.weight_scale has shape [31], [32] is needed"),
    "missing part": (tensor(f"{Q}.weight_bias", lambda t: None), "structure", f"tensor {Q}.weight_bias is missing"),
    "missing tensor": (tensor("model.norm.weight", lambda t: None), "files", "tensor model.norm.weight is not in"),
    "entry gone": (edited("config.json", lambda c: layers(c).pop(Q)), "config", f"{Q} is stored quantized"),
    "entry changed": (edited("config.json", lambda c: layers(c)[Q].update(group_num=3)), "config", f"{Q}: group_size must be such"),
    "total": (edited(INDEX, lambda i: i["metadata"].update(total_size=1)), "files", "says that the tensors have 1 bytes"),
    "index": (edited(INDEX, lambda i: i["weight_map"].pop("model.norm.weight")), "files", "model.norm.weight of model-00004"),
    "report": (lambda folder: (folder / "voroq_report.json").write_text("{"), "hashes", "voroq_report.json is damaged"),
    "truncated": (lambda f: shard_of(f, f"{Q}.perm").write_bytes(shard_of(f, f"{Q}.perm").read_bytes()[:-9]), "files", "is truncated"),
    "shard gone": (lambda folder: shard_of(folder, f"{Q}.perm").unlink(), "files", "is missing, though model.safetensors.index"),
    "bit": (tensor(f"{Q}.weight_scale", lambda t: t.neg()), "hashes", f"differs from voroq_report.json; changed: {Q}.weight_scale"),
    "model": (edited("config.json", lambda c: c.update(num_hidden_layers=1)), "model", "names a linear model.layers.1"),
    "architecture": (edited("config.json", lambda c: c.update(model_type="x", architectures=["X"])), "model", "cannot build the model"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_defect_is_found_and_named(folder, kind):
    assert verify_folder(folder).defects == []
    damage, check, message = DAMAGE[kind]
    damage(folder)
    found = verify_folder(folder).defects
    assert any(defect.check == check and message in defect.problem for defect in found), found
    assert all("\n" not in defect.problem for defect in found)


def test_all_defects_are_listed_and_not_only_the_first(folder):
    together = ["nan in a table", "nan elsewhere", "code", "permutation", "dtype", "shape", "missing part", "total"]
    for kind in together:
        DAMAGE[kind][0](folder)
    found = [defect.problem for defect in verify_folder(folder).defects]
    for kind in together:
        assert sum(DAMAGE[kind][2] in problem for problem in found) == 1, kind


def test_leftovers_and_a_missing_index_are_found(folder):
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.weight": STALE}), shard_of(folder, f"{Q}.perm").name)
    found = [defect.problem for defect in verify_folder(folder).defects]
    assert any(f"tensor {Q}.weight does not belong" in problem for problem in found)
    assert any(f"tensor {Q}.weight of model-" in problem and "loaders do not see it" in problem for problem in found)
    (folder / INDEX).unlink()
    assert any("has no model.safetensors.index.json" in defect.problem for defect in verify_folder(folder).defects)


def test_a_changed_file_is_said_with_the_tensors_that_changed(folder):
    name = shard_of(folder, f"{Q}.perm").name
    told = f"{name} is not the file that was written: its sha256 differs from voroq_report.json"
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.perm": tensors.pop(f"{Q}.perm")}), name)  # another order, the same values
    assert [defect.problem for defect in verify_folder(folder).defects] == [f"{told}; its tensors are as they were"]
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.perm": tensors[f"{Q}.perm"].flip(0)}), name)
    assert [defect.problem for defect in verify_folder(folder).defects] == [f"{told}; changed: {Q}.perm"]
    edited("voroq_report.json", lambda report: report.pop("tensors"))(folder)
    assert [defect.problem for defect in verify_folder(folder).defects] == [told]


def test_a_shard_in_a_sub_folder_is_one_defect_and_is_not_loaded(folder):
    name = shard_of(folder, f"{Q}.perm").name
    (folder / "sub").mkdir()
    (folder / name).rename(folder / "sub" / name)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {tensor: f"sub/{file}" if file == name else file for tensor, file in index["weight_map"].items()}
    write_json(folder / INDEX, index)
    found = [defect.problem for defect in verify_folder(folder).defects]
    assert sum(f"names 'sub/{name}', which is no safetensors file beside it" in problem for problem in found) == 1
    assert not any("though model.safetensors.index.json says so" in problem for problem in found)
    with pytest.raises(FormatError, match=r"'sub/model-.*is not the name of a safetensors file beside it"):
        voroq.load(folder, device="cpu")


def test_folders_of_others_are_verified_too(tmp_path):
    packed = write_model(tmp_path / "old", "qwen2", "vptq")
    make_old(tmp_path / "old", packed, floats=True)
    write_gptqmodel(tmp_path / "g")
    write_model(tmp_path / "native", "mixtral", "voroq")
    tiny("qwen3-moe").save_pretrained(tmp_path / "plain")
    for name, method, linears in [("old", "vptq", 14), ("g", "vptq", 14), ("native", "voroq", 24), ("plain", None, 0)]:
        found = verify_folder(tmp_path / name)
        assert (found.quant_method, found.linears, found.hashed, found.defects) == (method, linears, 0, []), name
        assert found.bytes == (tmp_path / name / "model.safetensors").stat().st_size
        assert (found.bits_per_weight is None) == (linears == 0)
    with pytest.raises(VoroqError, match=r"has no config.json"):
        verify_folder(tmp_path)


def test_the_commands_say_what_was_done_and_found(folder, tmp_path, capsys):
    assert run("verify", folder) == 0
    assert "good" in capsys.readouterr().out
    assert run("convert", folder, tmp_path / "dense", "--to", "dense", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["layout"] == "dense" and "shard 1/1" in err
    assert run("convert", folder, tmp_path / "again", "--shard-size", "0.01MB") == 0
    assert "14 linears in the vptq layout" in " ".join(capsys.readouterr().out.split())  # long paths wrap the line
    assert run("convert", folder, tmp_path / "again") == 2
    assert "exists already" in capsys.readouterr().err
    assert run("convert", folder, tmp_path / "x", "--shard-size", "5 apples") == 2
    assert "is no size: write for example 5GB" in capsys.readouterr().err
    DAMAGE["nan in a table"][0](folder)
    assert run("verify", folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert {defect["check"] for defect in found["defects"]} == {"values", "hashes"}
    assert run("verify", folder) == 1
    assert "2 defects" in capsys.readouterr().out
    assert run("verify", tmp_path / "nowhere") == 2
