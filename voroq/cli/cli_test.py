"""The command line: what reaches the library, what reaches stdout, and how everything that goes wrong ends."""

import json
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from voroq import native
from voroq.cli import main
from voroq.cli.app import app
from voroq.cli.quantize import parse_options
from voroq.errors import FormatError, VoroqError
from voroq.integrations.conftest import write_model
from voroq.packed.conftest import random_pvq
from voroq.pipeline.text import DEMO_MODEL


def run(*argv: object) -> int:
    """The exit code of one command."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    return caught.value.code


def test_help_imports_neither_torch_nor_transformers():
    code = """
import sys
from voroq.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    for argv in (["--help"], ["quantize", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_command_has_help_with_examples_and_json():
    runner = CliRunner()
    commands = ["quantize", "rotate", "eval", "inspect", "convert", "verify", "generate", "prune", "write", "chat", "methods", "demo"]
    listed = runner.invoke(app, ["--help"]).stdout
    for command in commands:
        assert command in listed
        text = runner.invoke(app, [command, "--help"]).stdout
        assert "Examples" in text
        assert "--json" in text


def test_version_is_the_package_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("voroq ")


@pytest.mark.parametrize(
    "error", [VoroqError("bits 0.1 cannot be\nreached: give 1.5"), FormatError("bits 0.1 cannot be reached: give 1.5")]
)
def test_an_error_of_the_library_is_one_line_and_exit_code_2(library, capsys, error):
    library.fails = error
    assert run("quantize", "in", "out", "--json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "error: bits 0.1 cannot be reached: give 1.5"


def test_an_interruption_says_how_to_go_on(library, capsys):
    library.fails = KeyboardInterrupt()
    assert run("quantize", "in", "out") == 130
    assert "--resume continues" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(library):
    library.fails = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["quantize", "in", "out"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "No such command"),
        (["quantize"], "MODEL"),
        (["quantize", "in"], "OUT"),
        (["quantize", "in", "out", "--bogus"], "--bogus"),
        (["quantize", "in", "out", "--samples", "0"], "--samples"),
        (["quantize", "in", "out", "--context", "0"], "--context"),
        (["quantize", "in", "out", "--seed", "-1"], "--seed"),
        (["quantize", "in", "out", "--bits", "two"], "--bits"),
        (["quantize", "in", "out", "--mode", "both"], "--mode"),
        (["quantize", "in", "out", "--effort", "most"], "--effort"),
        (["quantize", "in", "out", "--option", "damping"], "not KEY=VALUE"),
        (["quantize", "in", "out", "-o", "damping=1", "-o", "damping=2"], "given twice"),
        (["eval", DEMO_MODEL, "--context", "1"], "--context"),
        (["eval", DEMO_MODEL, "--windows", "0"], "--windows"),
        (["eval", DEMO_MODEL, "--text", "nowhere.txt"], "no text nowhere.txt: give"),
        (["eval", "./nowhere"], "./nowhere"),
        (["eval", DEMO_MODEL, "--context", "4096"], "exceeds the model's 1024 positions"),
        (["eval", DEMO_MODEL, "--device", "abacus"], "device abacus is unknown"),
        (["eval", DEMO_MODEL, "--dtype", "int3"], "dtype int3 is unknown"),
        (["inspect", "./nowhere"], "./nowhere"),
        (["generate", "./nowhere", "x"], "./nowhere"),
        (["generate", DEMO_MODEL, ""], "the prompt is empty"),
        (["generate", DEMO_MODEL, "x", "--max-new-tokens", "5000"], "exceed the model's 1024 positions"),
        (["generate", DEMO_MODEL, "x", "--temperature", "-1"], "--temperature"),
        (["write", DEMO_MODEL, "own.txt"], "one that ends in .jsonl"),
        (["write", DEMO_MODEL, "nowhere/own.jsonl"], "no folder nowhere"),
        (["write", DEMO_MODEL, "own.jsonl", "--tokens", "1024"], "exceed the model's 1024 positions: give --tokens 1023 or less"),
        (["write", DEMO_MODEL, "own.jsonl", "--begin", "nowhere"], "choose bos or anywhere"),
        (["write", DEMO_MODEL, "own.jsonl", "--temperature", "0"], "temperature above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(library, capsys, argv, message):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert message in err
    assert library.call is None


def test_calling_without_a_command_shows_the_help(capsys):
    assert run() == 2
    out, err = capsys.readouterr()
    assert "quantize" in out + err
    assert "error:" not in err


def test_options_are_pairs():
    assert parse_options(["a=1", "b-c = x=y "]) == {"a": "1", "b_c": "x=y"}
    for bad in (["a"], ["=1"], ["a="], ["a=1", "a=1"]):
        with pytest.raises(VoroqError):
            parse_options(bad)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "magic"], "vptq, pvq, gptq, rtn"),
        (["--option", "colour=red"], "vector_length"),
        (["--option", "damping=red"], "damping=red"),
        (["--option", "damping=7"], "damping=7"),
        (["--bits", "0"], "out of range"),
        (["--bits", "17"], "out of range"),
    ],
)
def test_a_wrong_method_option_or_rate_names_what_is_possible(capsys, tmp_path, argv, message):
    assert run("quantize", DEMO_MODEL, tmp_path / "out", *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_methods_lists_every_option_with_default_and_meaning(capsys):
    from voroq.methods import METHODS

    assert run("methods", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(METHODS)
    for name, method in found.items():
        assert method["about"]
        assert list(method["options"]) == [field.name for field in fields(METHODS[name])]
        for option in method["options"].values():
            assert option["help"]
            assert set(option) == {"default", "help"}
    assert run("methods") == 0
    out = capsys.readouterr().out
    assert "vector_length" in out
    assert "act_order" in out


def test_eval_json_is_all_of_stdout_and_has_the_promised_keys(capsys):
    assert run("eval", DEMO_MODEL, "--against", DEMO_MODEL, "--text", "c4", "--context", "64", "--windows", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"perplexity", "kl", "top1", "tokens", "context", "bits_per_weight"} <= set(found)
    assert (found["kl"], found["top1"], found["tokens"], found["context"], found["bits_per_weight"]) == (0.0, 1.0, 126, 64, 16.0)
    assert found["texts"][0]["perplexity"] == found["perplexity"] == found["perplexity_against"]


def test_eval_pools_its_texts_and_prints_a_row_for_each(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a short name: long ones are cut to the width of the terminal
    (tmp_path / "mine.txt").write_text("The sea was calm and the old man slept. " * 30)
    assert run("eval", DEMO_MODEL, "--text", "books", "--text", "mine.txt", "--context", "32", "--windows", "3") == 0
    out = capsys.readouterr().out
    assert "books" in out
    assert "mine.txt" in out
    assert "16.000 bits per weight, context 32" in out


def test_bench_measures_both_models_at_every_batch(capsys):
    given = ["--batch", "1", "--batch", "2", "--prompt", "8", "--new", "2", "--repeats", "1"]
    assert run("bench", DEMO_MODEL, "--against", f"{DEMO_MODEL}/", *given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(speed["model"], speed["batch"]) for speed in found["speeds"]] == [
        (name, batch) for batch in (1, 2) for name in (str(DEMO_MODEL), f"{DEMO_MODEL}/")
    ]
    assert all(speed["prefill"] > 0 for speed in found["speeds"])
    assert all(speed["decode"] is None or (speed["decode"] > 0 and speed["of_limit"] > 0) for speed in found["speeds"])
    model = LlamaForCausalLM.from_pretrained(DEMO_MODEL)
    assert set(found["weights"].values()) == {sum(4 * p.numel() for p in model.parameters())}
    assert found["peak"]["rss"] is None or found["peak"]["rss"] > sum(found["weights"].values())
    assert run("bench", DEMO_MODEL, *given) == 0
    assert "of the limit" in capsys.readouterr().out


def test_bench_says_who_makes_the_steps(capsys):
    given = ["--batch", "1", "--prompt", "4", "--new", "2", "--repeats", "1", "--json"]
    best = "the library" if native.library() else "torch, as the library of CPU kernels is missing"
    for more, by in (([], best), (["--torch-steps"], "torch")):
        assert run("bench", DEMO_MODEL, *given, *more) == 0
        assert json.loads(capsys.readouterr().out)["steps"][str(DEMO_MODEL)].startswith(by)


def test_bench_counts_what_expanding_takes(capsys, tmp_path):
    write_model(tmp_path / "m", "llama", "voroq", linear=random_pvq)
    weights = []
    for more in ([], ["--expand"]):
        assert run("bench", tmp_path / "m", *more, "--batch", "1", "--prompt", "4", "--new", "2", "--repeats", "1", "--json") == 0
        weights.append(json.loads(capsys.readouterr().out)["weights"][str(tmp_path / "m")])
    assert weights[1] > weights[0]


def test_bench_refuses_more_tokens_than_positions(capsys):
    assert run("bench", DEMO_MODEL, "--prompt", "100000") == 2
    assert "give a shorter --prompt" in capsys.readouterr().err


def test_inspect_json_lists_what_is_stored(capsys):
    assert run("inspect", DEMO_MODEL, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quant_method"] is None
    assert found["bits_per_weight"] == 16.0
    assert found["unquantized_share"] == 1.0
    assert {tensor["name"] for tensor in found["unquantized"]} >= {"lm_head.weight", "model.embed_tokens.weight"}


def test_generate_is_the_same_for_the_same_seed(capsys):
    def once(*extra: str) -> dict:
        assert run("generate", DEMO_MODEL, "The old man", "--max-new-tokens", "8", "--json", *extra) == 0
        return json.loads(capsys.readouterr().out)

    first, again, other = once(), once(), once("--seed", "1")
    assert first["text"] == again["text"] != other["text"]
    assert (first["prompt"], first["tokens"]) == ("The old man", 8)
    assert once("--temperature", "0")["text"] == once("--temperature", "0", "--seed", "1")["text"]
    assert run("generate", DEMO_MODEL, "The old man", "--max-new-tokens", "8") == 0
    assert capsys.readouterr().out.strip() == ("The old man" + first["text"]).strip()


def test_a_quantized_cache_is_used_where_asked_for(capsys):
    words = ("generate", DEMO_MODEL, "The old man looked at the sea", "--max-new-tokens", "24", "--temperature", "0", "--json")
    texts = []
    for extra in ((), ("--cache-bits", "1", "--cache-recent", "0"), ("--cache-bits", "1", "--cache-recent", "64")):
        assert run(*words, *extra) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[2] != texts[1]
    found = []
    for extra in ((), ("--cache-bits", "2", "--cache-recent", "0")):
        assert run("eval", DEMO_MODEL, "--windows", "1", "--context", "48", "--json", *extra) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["perplexity"] != found[1]["perplexity"] and found[1]["cache_bits"] == 2.0
    assert run(*words, "--cache-bits", "9") == 2
    assert "9 bits are out of range" in capsys.readouterr().err


def test_chat_answers_each_line_until_quit(capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/reset\nAgain\n/quit\nnever\n"))
    assert run("chat", DEMO_MODEL, "--max-new-tokens", "4", "--json") == 0
    out, err = capsys.readouterr()
    replies = [json.loads(line) for line in out.splitlines()]
    assert [reply["role"] for reply in replies] == ["assistant", "assistant"]
    assert "no chat template" in err


def test_rotate_passes_everything_on_and_says_what_was_done(monkeypatch, capsys):
    seen = {}
    report = {"source": "in", "width": 384, "block": 128, "readers": 26, "writers": 10, "heads": 5, "head_dim": 64, "untied": True}

    def rotate_model(*args, progress, **kwargs):
        seen.update(kwargs, args=args)
        return {**report, "bytes": 22_000_000, "seconds": 3.0}

    monkeypatch.setitem(sys.modules, "voroq.pipeline.rotate", SimpleNamespace(rotate_model=rotate_model))
    assert run("rotate", "in", "out", "--no-heads", "--dtype", "float32", "--seed", 4, "--revision", "abc", "--trust-remote-code") == 0
    assert seen == {
        "args": ("in", "out"), "heads": False, "dtype": "float32", "seed": 4, "revision": "abc", "trust_remote_code": True,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "in blocks of 128" in out and "no longer tied" in out and "voroq eval out --against in" in out
    assert run("rotate", "in", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["readers"] == 26
    assert seen["heads"] is True and seen["dtype"] is None
