"""The command line: what reaches the library, what reaches stdout, and how everything that goes wrong ends."""

import json
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from voroq.cli import main
from voroq.cli.app import app
from voroq.cli.quantize import parse_options
from voroq.errors import FormatError, VoroqError
from voroq.integrations.conftest import write_model
from voroq.packed.conftest import random_pvq
from voroq.pipeline.effort import EFFORTS
from voroq.pipeline.text import DEMO_MODEL
from voroq.tuning.loop import Tuning

REPORT = {"source": "in", "bits_per_weight": 2.05, "seconds": 75.0, "peak_memory": {"rss": 10**9, "cuda": None},
          "tuning": {"kl_before": 0.09, "kl_after": 0.05}}  # fmt: skip


def run(*argv: object) -> int:
    """The exit code of one command."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    return caught.value.code


@pytest.fixture
def library(monkeypatch):
    """The pipeline replaced by a recorder; `fails` is raised by it if set."""
    seen = SimpleNamespace(plan=None, call=None, fails=None)

    def make_plan(*args):
        seen.plan = args
        return "the plan"

    def quantize_model(*args, progress, **kwargs):
        seen.call = (args, kwargs)
        progress.start(2, 4)
        progress.block(0, "layers.0")
        progress.stage("observing")
        progress.site("layers.0.q_proj", 0.5, 0.0213)
        progress.warn("a [warning]")
        if seen.fails is not None:
            raise seen.fails
        progress.done()
        return REPORT

    def plan_model(*args, progress, **kwargs):
        seen.planned = (args, kwargs)
        return SimpleNamespace(plan="the allocation")

    monkeypatch.setitem(sys.modules, "voroq.pipeline.plan", SimpleNamespace(make_plan=make_plan))
    planning = SimpleNamespace(plan_model=plan_model, read_plan=lambda path: f"the plan in {path}")
    monkeypatch.setitem(sys.modules, "voroq.pipeline.planning", planning)
    seen.checked = []
    run = SimpleNamespace(check_memory_of=lambda model, **rest: seen.checked.append(model))
    monkeypatch.setitem(sys.modules, "voroq.pipeline.run", run)
    monkeypatch.setitem(sys.modules, "voroq.front", SimpleNamespace(quantize_model=quantize_model))
    return seen


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
    commands = ["quantize", "rotate", "eval", "inspect", "convert", "verify", "generate", "chat", "methods", "demo"]
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


def test_quantize_passes_everything_on(library, capsys):
    argv = ["quantize", "in", "out", "--method", "gptq", "--bits", "3.2", "--option", "group-size=64", "-o", "damping = 0.02"]
    argv += ["--calibration", "c.txt", "--samples", "7", "--context", "33", "--mode", "sequential", "--device", "cpu", "--seed", "5"]
    assert run(*argv, "--resume", "--trust-remote-code", "--revision", "abc", "--json") == 0
    assert library.plan == ("gptq", 3.2, {"group_size": "64", "damping": "0.02"})
    args, kwargs = library.call
    assert args == ("in", "out", "the plan")
    assert kwargs == {
        "calibration": "c.txt", "samples": 7, "context": 33, "mode": "sequential", "hessian": "auto", "device": "cpu", "seed": 5,
        "resume": True, "revision": "abc", "trust_remote_code": True, "block_tuning": None,
        "tuning": None,
    }  # fmt: skip
    assert type(kwargs["mode"]) is str
    out, err = capsys.readouterr()
    assert json.loads(out) == REPORT
    assert "block 1/2  layers.0.q_proj  loss 0.0213  0.5 s  ETA" in err
    assert "warning: a [warning]" in err


def test_effort_is_a_tuning_and_options_that_yield_to_the_users(library):
    run("quantize", "in", "out", "--effort", "balanced")
    assert library.call[1]["tuning"] == EFFORTS["balanced"].tuning is not None
    assert library.checked == ["in"]
    run("quantize", "in", "out", "--effort", "best", "-o", "rounds=7")
    assert library.call[1]["tuning"] == EFFORTS["best"].tuning
    assert library.plan == ("vptq", None, {**EFFORTS["best"].options["vptq"], "rounds": "7"})


@pytest.mark.parametrize(
    ("given", "effort"),
    [([], "balanced"), (["--method", "gptq"], "fast"), (["--tune-blocks", "9"], "fast"), (["--effort", "fast"], "fast")],
)
def test_what_the_effort_is_where_none_is_given(given, effort, library):
    run("quantize", "in", "out", *given)
    assert library.call[1]["tuning"] == EFFORTS[effort].tuning
    assert library.checked == (["in"] if effort == "balanced" else [])


def test_steps_of_blocks_are_passed_on(library):
    run("quantize", "in", "out", "--tune-blocks", "7")
    assert library.call[1]["block_tuning"] == Tuning(steps=7) and library.call[1]["tuning"] is None


def test_a_plan_comes_from_a_file_or_from_an_allocation(library, capsys):
    run("quantize", "in", "out", "--plan", "p.json", "--hessian", "two-sided")
    assert library.call[0] == ("in", "out", "the plan in p.json") and library.call[1]["hessian"] == "two-sided"
    run("quantize", "in", "out", "--bits", "2.1", "--allocate", "--context", "33")
    assert library.call[0] == ("in", "out", "the allocation")
    assert library.planned[0] == ("in", "the plan") and library.planned[1]["context"] == 33
    assert run("quantize", "in", "out", "--plan", "p.json", "--bits", "2") == 2
    assert "one or the other" in capsys.readouterr().err


def test_absent_bits_are_left_to_the_plan(library):
    run("quantize", "in", "out", "-o", "table_bits=8")
    assert library.plan == ("vptq", None, {"table_bits": "8"})


def test_quantize_without_json_says_what_was_made(library, capsys):
    run("quantize", "in", "out")
    out = capsys.readouterr().out
    assert "2.050" in out
    assert "1 min 15 s" in out
    assert "0.0900 -> 0.0500" in out
    assert "voroq eval out --against in" in out


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
