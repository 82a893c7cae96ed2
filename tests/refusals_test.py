"""Bad input through the command line: one line that says what to do, exit code 2, and nothing left behind."""

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from voroq.cli import main
from voroq.errors import VoroqError
from voroq.pipeline.model import OpenModel
from voroq.pipeline.plan import Plan
from voroq.pipeline.tiny_runs_test import QUICK, content, quick_run, tiny_source, write_text, write_tokenizer


@pytest.fixture
def source(tmp_path):
    return tiny_source(tmp_path / "in")


def refused(capsys: pytest.CaptureFixture, source: Path | str, out: Path, *more: object) -> str:
    """The one error line of a `voroq quantize` that must fail; `out` must not exist afterwards."""
    existed = out.exists()
    given = [str(word) for word in more]
    if "--calibration" not in given and isinstance(source, Path):
        given += ["--calibration", str(source / "text.txt")]
    if "--option" not in given and "--bits" not in given:
        given += ["--method", "rtn", "--option", "bits=4", "--option", "group_size=16"]
    with pytest.raises(SystemExit) as caught:
        main(["quantize", str(source), str(out), "--effort", "fast", "--context", "16", "--samples", "4", "--device", "cpu", *given])
    stdout, stderr = capsys.readouterr()
    assert caught.value.code == 2
    assert stdout == ""
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert stderr.rstrip().endswith(line)
    assert existed or not out.exists()
    return line


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_the_call_itself_is_right(source, tmp_path, capsys):
    """Without anything wrong the same call works: what the tests below refuse is what they say."""
    with pytest.raises(AssertionError), pytest.raises(SystemExit):
        refused(capsys, source, tmp_path / "out")
    assert (tmp_path / "out" / "voroq_report.json").is_file()
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_missing_model(tmp_path, capsys):
    assert "there is no folder './nowhere'" in refused(capsys, "./nowhere", tmp_path / "out")


def test_a_folder_without_config(tmp_path, capsys):
    assert "has no config.json" in refused(capsys, tmp_path, tmp_path / "out")


def test_no_tokenizer(source, tmp_path, capsys):
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(capsys, source, tmp_path / "out")


@pytest.mark.parametrize("fields", [{"model_type": "unheard_of"}, {"architectures": ["UnheardOfForCausalLM"]}])
def test_an_unknown_architecture(source, tmp_path, capsys, fields):
    edit(source, **fields)
    assert next(iter(fields.values()))[0] in refused(capsys, source, tmp_path / "out")


def test_not_enough_disk(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "its disk has 0.000 GB free" in refused(capsys, source, tmp_path / "out")


def test_out_that_is_something_else(source, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "exists and is not a voroq run" in refused(capsys, source, tmp_path / "mine")
    assert "exists and is not a voroq run" in refused(capsys, source, tmp_path / "mine", "--resume")
    assert "is a file" in refused(capsys, source, tmp_path / "mine" / "thesis.txt")
    assert "cannot write" in refused(capsys, source, tmp_path / "mine" / "thesis.txt" / "out")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert "exists and is not a voroq run" in refused(capsys, source, source)


def test_calibration_that_is_missing_empty_or_short(source, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    write_text(tmp_path / "short.txt", letters=15)
    for name, message in {"none.txt": "no calibration text", "empty.txt": "is empty", "short.txt": "15 tokens, shorter than one"}.items():
        assert message in refused(capsys, source, tmp_path / "out", "--calibration", tmp_path / name)


def test_windows_longer_than_the_model_can_read(source, tmp_path, capsys):
    assert "exceed the model's 64 positions" in refused(capsys, source, tmp_path / "out", "--context", 65)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "gptq", "--option", "bits=9"], "bits=9 is out of range; a grid has 1 to 8 bits"),
        (["--method", "gptq", "--option", "damping=nan"], "damping=nan is out of range"),
        (["--option", "vector_length=65"], "vector_length=65 is out of range; give 1 to 64"),
        (["--option", "bits=2"], "vptq has no option 'bits'; valid options are vector_length, table_bits"),
        (["--option", "groups=64", "--option", "table_bits=2"], "64 groups do not fit into 32 columns"),
        (["--bits", "0.5"], "0.5 bits per weight cannot be reached by vptq on this model"),
        (["--method", "gptq", "--bits", "2.0"], "ask for at least"),
        (["--method", "rtn", "--bits", "nan"], "out of range"),
    ],
)
def test_options_out_of_range_and_bits_out_of_reach(source, tmp_path, capsys, more, message):
    assert message in refused(capsys, source, tmp_path / "out", *more)


def test_corrupted_and_truncated_shards(source, tmp_path, capsys):
    shard = source / "model.safetensors"
    whole = shard.read_bytes()
    for damaged in (whole[:-8], whole[:4], b"\xff" * 8 + whole[8:], whole + b"\0"):
        shard.write_bytes(damaged)
        line = refused(capsys, source, tmp_path / "out")
        assert "model.safetensors" in line
        assert "corrupted or truncated" in line


def test_a_shard_that_lacks_a_tensor(source, tmp_path, capsys):
    change_weights(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "no tensor for model.layers.1.mlp.up_proj.weight" in refused(capsys, source, tmp_path / "out")


def test_a_model_that_is_quantized_already(source, tmp_path, capsys):
    quick_run(source, tmp_path / "once")
    line = refused(capsys, tmp_path / "once", tmp_path / "twice", "--calibration", source / "text.txt")
    assert "already quantized" in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers(source, tmp_path, capsys, name, value):
    """Found when the weight is read: what is finished by then stays, to be continued with the repaired model's own run."""
    change_weights(source, lambda tensors: tensors[name].view(-1)[3].fill_(value))
    (tmp_path / "out").mkdir()  # a run may begin in an empty folder, and this one leaves its unfinished state there
    assert f"tensor {name} in" in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / "voroq_run" / "settings.json").is_file()


def test_a_tokenizer_of_another_model(source, tmp_path, capsys):
    edit(source, vocab_size=40)
    outer = ("model.embed_tokens.weight", "lm_head.weight")
    change_weights(source, lambda tensors: tensors.update({name: tensors[name][:40].clone() for name in outer}))
    assert "the model knows 40" in refused(capsys, source, tmp_path / "out")


def test_a_model_whose_blocks_are_mostly_something_else(tmp_path, capsys):
    """gpt-oss stacks its experts transposed, with biases and a clamped gate: not linears, and most of the weights."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    source = tmp_path / "in"
    with torch.random.fork_rng():
        GptOssForCausalLM(GptOssConfig(**sizes, intermediate_size=48, num_local_experts=4)).save_pretrained(source)
    write_tokenizer(source)
    write_text(source / "text.txt")
    line = refused(capsys, source, tmp_path / "out")
    assert "of the weights in the model's blocks are nn.Linear" in line
    assert "model.layers.0.mlp.experts.gate_up_proj" in line


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(QUICK["rtn"], (("*.experts.3.*", None),)), "quantizes some experts of model.layers.1.mlp and not others"),
        (Plan(None, (("nothing", QUICK["rtn"]),)), "leaves every linear of the model as it is"),
    ],
)
def test_plans_that_cannot_be(tmp_path, plan, message):
    source = tiny_source(tmp_path / "in", "Qwen3Moe")
    with pytest.raises(VoroqError, match=message):
        quick_run(source, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


def test_sites_that_share_a_tensor_on_disk_go_together(source, tmp_path, monkeypatch):
    """Some checkpoints store q, k and v as one tensor that is cut on loading; what is left of it cannot be written."""
    fused = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    monkeypatch.setattr(OpenModel, "site_of", lambda self, name: fused if name == f"{fused[0]}.weight" else None)
    with pytest.raises(VoroqError, match=f"{fused[0]}.weight holds the weights of both {fused[0]}, which .* and {fused[1]}, which"):
        quick_run(source, tmp_path / "out", Plan(QUICK["rtn"], (("*.k_proj", None),)))
    assert not (tmp_path / "out").exists()


def test_a_method_that_fails_names_the_site(source, tmp_path):
    def wrong(w, moments, rng):
        return QUICK["rtn"](w[:8], moments, rng)

    with pytest.raises(VoroqError, match=r"model.layers.0.self_attn.q_proj: the method made a matrix of \(8, 32\) from one of \(32, 32\)"):
        quick_run(source, tmp_path / "out", wrong)


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_afterwards(source, tmp_path, monkeypatch):
    quick_run(source, tmp_path / "whole")
    for written in (0, 3, 9, 14):
        left = iter(range(written))

        def flush(handle: int, left=left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched, pytest.raises(VoroqError, match="No space left on device"):
            patched.setattr("os.fsync", flush)
            quick_run(source, tmp_path / str(written))
        quick_run(source, tmp_path / str(written), resume=True)
        assert content(tmp_path / str(written)) == content(tmp_path / "whole")


def test_unknown_devices_and_modes(source, tmp_path, capsys):
    assert "unknown device 'abacus'" in refused(capsys, source, tmp_path / "out", "--device", "abacus")
    assert "device meta is not supported" in refused(capsys, source, tmp_path / "out", "--device", "meta")
    with pytest.raises(VoroqError, match="mode 'both' is unknown; choose parallel, sequential or asymmetric"):
        quick_run(source, tmp_path / "out", mode="both")
