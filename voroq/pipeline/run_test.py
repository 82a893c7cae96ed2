"""A run's result is an ordinary folder that loads as the dense model whose weights its shards say, for every architecture."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import voroq
from voroq import native
from voroq.codebook.table import Table
from voroq.errors import VoroqError
from voroq.experts import Experts
from voroq.methods import GPTQ, RTN, VPTQ
from voroq.methods.rtn import grid_slabs
from voroq.moments import Moments
from voroq.packed.checkpoint import open_folder
from voroq.packed.format import bits_per_weight, unpack
from voroq.pipeline.model import OpenModel
from voroq.pipeline.plan import Budget, Plan
from voroq.pipeline.progress import Silent
from voroq.pipeline.run import _resolved
from voroq.pipeline.tiny_models_test import CONFIGS, tiny_model, tiny_tokens
from voroq.pipeline.tiny_runs_test import LETTERS, QUICK, content, quick_run, tiny_source, two_blocks
from voroq.quantized import Band, Quantized, Tile
from voroq.rounding.nearest import round_to_nearest
from voroq.transform.chain import Chain


def original(name: str) -> nn.Module:
    """The model that `tiny_source` saves."""
    return tiny_model(name, **two_blocks(name))


def dense_twin(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the weights that `folder` stores, dequantized; stacks of experts stay stacks."""
    stored = open_folder(folder)
    with torch.no_grad():
        for name in stored.sites():
            weight = unpack(stored.packed(name)).dequantize()
            head, _, leaf = name.rpartition(".")
            stack, _, expert = head.rpartition(".")
            if ".experts." in name:
                model.get_parameter(f"{stack}.{leaf}")[int(expert)] = weight
            else:
                model.get_parameter(f"{name}.weight").copy_(weight)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_tokens()).logits


def test_pyramids_weigh_outputs_where_that_is_quick_or_asked_for(monkeypatch):
    """Their search in a metric is the library's; without it, or on another device, `auto` leaves the gradients out."""
    heads = (SimpleNamespace(get_output_embeddings=lambda it=it: it) for it in (object(), None))
    with_head, without = (Mock(spec=OpenModel, skeleton=skeleton) for skeleton in heads)
    cpu, gpu, pvq = torch.device("cpu"), torch.device("cuda:0"), QUICK["pvq"]

    def used(hessian: str, *methods, device: torch.device = cpu, model=with_head) -> bool:
        return _resolved(model, hessian, methods, (device,)) == "two-sided"

    monkeypatch.setattr(native, "library", lambda: object())
    assert used("auto", pvq) and used("auto", QUICK["rtn"], pvq) and not used("input", pvq) and not used("auto", pvq, model=without)
    assert not used("auto", QUICK["rtn"]) and not used("two-sided", dataclasses.replace(pvq, gains="paper"))
    assert not used("auto", pvq, device=gpu) and used("two-sided", pvq, device=gpu) and used("auto", QUICK["vptq"], device=gpu)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not used("auto", pvq) and used("two-sided", pvq) and used("auto", QUICK["vptq"])


def test_guided_moments_are_for_tables_and_make_other_codes(tmp_path):
    source = tiny_source(tmp_path / "in", "Llama")
    with pytest.raises(VoroqError, match="guided is for vptq; GPTQ takes"):
        quick_run(source, tmp_path / "no", QUICK["gptq"], hessian="guided")
    report = quick_run(source, tmp_path / "guided", QUICK["vptq"], hessian="guided")
    assert report["hessian"] == "guided" and report["settings"]["hessian"] == "guided"
    quick_run(source, tmp_path / "plain", QUICK["vptq"], hessian="input")
    guided, plain = tensors(tmp_path / "guided"), tensors(tmp_path / "plain")
    assert guided.keys() == plain.keys() and any(not torch.equal(guided[name], plain[name]) for name in plain if "indices" in name)


SEEDED = Plan(QUICK["rtn"], (("*.v_proj", QUICK["vptq"]),))
"""Quick, and one site of each block depends on the seed."""
BOTH_FORMATS = ("Llama", "Qwen2", "Mixtral", "Bert")


@pytest.mark.parametrize(
    ("name", "method"), [*[(name, "vptq") for name in CONFIGS], *[(name, how) for name in BOTH_FORMATS for how in ("rtn", "pvq")]]
)
def test_loading_a_result_gives_the_dense_model_its_shards_describe(name, method, tmp_path):
    source, out = tiny_source(tmp_path / "in", name), tmp_path / "out"
    report = quick_run(source, out, QUICK[method])
    model, tokenizer = voroq.load(out, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(dense_twin(original(name), out)), rtol=1e-5, atol=1e-5)
    assert tokenizer("ab0")["input_ids"][-3:] == [4 + LETTERS.index(letter) for letter in "ab0"]
    config = json.loads((out / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == {**before, "torch_dtype": before["dtype"]}  # the official vptq loader reads the second name
    assert quantization["quant_method"] == {"rtn": "voroq", "pvq": "voroq", "vptq": "vptq"}[method]
    check_report(report, source, out)
    assert json.loads((out / "voroq_report.json").read_text()) == report


def check_report(report: dict, source: Path, out: Path) -> None:
    """The report against the files: every site with its true bits, every other tensor listed and copied bit for bit."""
    stored, before = open_folder(out), tensors(source)
    sites, specs = {site["name"]: site for site in report["sites"]}, stored.sites()
    assert sites.keys() == specs.keys()
    total = weights = 0
    for name, site in sites.items():
        packed = stored.packed(name)
        assert tuple(site["shape"]) == packed.spec.shape
        assert site["bits_per_weight"] == pytest.approx(bits_per_weight(packed))
        assert 0 < site["loss"] < 1
        total += bits_per_weight(packed) * site["shape"][0] * site["shape"][1]
        weights += site["shape"][0] * site["shape"][1]
    assert report["bits_per_weight"] == pytest.approx(total / weights)
    owned = {f"{name}.{local.name}" for name, spec in specs.items() for local in spec.layout()}
    after = tensors(out)
    kept = {entry["name"]: tuple(entry["shape"]) for entry in report["unquantized"]}
    assert kept == {name: tuple(after[name].shape) for name in after.keys() - owned}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    recorded = {name: entry["bias"] for name, entry in quantization(out).get("config_for_layers", {}).items()}
    assert recorded in ({}, {name: f"{name}.bias" in after for name in specs})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert index["weight_map"].keys() == after.keys()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_experts_with_few_tokens_borrow_and_the_report_says_so(tmp_path):
    source = tiny_source(tmp_path / "in", "Qwen3Moe")
    report = quick_run(source, tmp_path / "out", QUICK["gptq"], samples=3, context=8)
    experts = [site for site in report["sites"] if ".experts." in site["name"] and site["shape"][1] == 32]
    others = [site for site in report["sites"] if ".experts." not in site["name"]]
    assert all(site["tokens"] == 24 for site in others)
    assert all("24 calibration tokens for" in " ".join(site["notes"]) for site in others)
    assert len(experts) == 8
    assert sum(site["tokens"] for site in experts) == 24 * 2  # each token goes to two experts
    assert all(f"saw {site['tokens']} tokens for 32 input columns; borrowed" in " ".join(site["notes"]) for site in experts)


@pytest.mark.parametrize("method", ["gptq", "pvq", "vptq"])
def test_saving_a_loaded_result_gives_back_its_tensors(method, tmp_path):
    source, out = tiny_source(tmp_path / "in", "Qwen2"), tmp_path / "out"
    quick_run(source, out, QUICK[method])
    voroq.load(out, device="cpu")[0].save_pretrained(tmp_path / "again")
    before, after = tensors(out), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert quantization(out) == quantization(tmp_path / "again")


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_the_seed_decides_every_byte(tmp_path):
    source = tiny_source(tmp_path / "in")
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        quick_run(source, tmp_path / name, SEEDED, samples=25, seed=seed)  # all windows, so that only k-means may differ
    first, again, other = (content(tmp_path / name) for name in "abc")
    assert first == again
    assert sum(first[name] != other[name] for name in first) == 2  # one shard per block


def test_number_and_order_of_devices_change_no_byte(tmp_path):
    source = tiny_source(tmp_path / "in")
    for name, device in {"one": "cpu", "three": "cpu,cpu,cpu"}.items():
        quick_run(source, tmp_path / name, SEEDED, device=device)
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_asymmetric_blocks_answer_what_they_see_as_the_originals_did(tmp_path):
    source = tiny_source(tmp_path / "in")
    modes = ("sequential", "asymmetric")
    reports = {mode: quick_run(source, tmp_path / mode, QUICK["gptq"], mode=mode) for mode in modes}
    sequential, asymmetric = (content(tmp_path / mode) for mode in reports)
    blocks = [f"model-0000{number}-of-00003.safetensors" for number in (2, 3)]
    assert [sequential[name] == asymmetric[name] for name in blocks] == [True, False]  # nothing is off before the first block


def test_sequential_blocks_see_their_quantized_predecessors(tmp_path):
    source = tiny_source(tmp_path / "in")
    reports = {mode: quick_run(source, tmp_path / mode, QUICK["gptq"], mode=mode) for mode in ("parallel", "sequential")}
    parallel, sequential = (content(tmp_path / mode) for mode in reports)
    blocks = [f"model-0000{number}-of-00003.safetensors" for number in (2, 3)]
    assert [parallel[name] == sequential[name] for name in blocks] == [True, False]
    assert reports["sequential"]["mode"] == "sequential"


def test_rules_choose_methods_and_leave_sites_alone(tmp_path):
    source, out = tiny_source(tmp_path / "in"), tmp_path / "out"
    plan = Plan(QUICK["vptq"], (("*.layers.0.*", None), ("*.down_proj", QUICK["gptq"])))
    report = quick_run(source, out, plan)
    methods = {site["name"]: site["method"] for site in report["sites"]}
    assert len(methods) == 7
    assert methods["model.layers.1.mlp.down_proj"] == repr(QUICK["gptq"])
    assert methods["model.layers.1.mlp.up_proj"] == repr(QUICK["vptq"])
    assert (report["method"], report["options"]) == ("gptq, vptq", {})
    assert quantization(out)["quant_method"] == "voroq"
    model, _ = voroq.load(out, device="cpu")
    torch.testing.assert_close(logits(model), logits(dense_twin(original("Llama"), out)), rtol=1e-5, atol=1e-5)


def test_a_rule_that_matches_nothing_does_not_change_the_format(tmp_path):
    source = tiny_source(tmp_path / "in")
    quick_run(source, tmp_path / "out", Plan(QUICK["vptq"], (("nothing", QUICK["gptq"]),)))
    assert quantization(tmp_path / "out")["quant_method"] == "vptq"


def test_the_report_carries_the_options_of_a_uniform_plan(tmp_path):
    source = tiny_source(tmp_path / "in")
    report = quick_run(source, tmp_path / "out", QUICK["gptq"])
    assert report["method"] == "gptq"
    assert report["options"] == {"bits": 3, "group_size": 20, "act_order": True, "grid": "minmax", "damping": 0.01}


def test_a_budget_is_met_by_what_is_really_stored(tmp_path):
    source = tiny_source(tmp_path / "in")
    report = quick_run(source, tmp_path / "out", Budget("vptq", 4.0, (("kmeans_steps", 1), ("rounds", 0))))
    assert 3.8 < report["bits_per_weight"] <= 4.0


@dataclass(frozen=True)
class Halves:
    """A method of one's own: pairs along the input, the table simply the first 16 pairs."""

    words: int = 16

    def __call__(self, w: torch.Tensor, moments: Moments, rng: torch.Generator) -> Quantized:
        tile = Tile(1, 2)
        bands, codes = round_to_nearest(w, [Band(0, w.shape[1], tile, Table(tile.cut(w)[: self.words]))])
        return Quantized(tuple(w.shape), Chain(), bands, codes)


def binary(w: torch.Tensor, moments: Moments, rng: torch.Generator) -> Quantized:
    """A method that is a plain function."""
    bands, codes = round_to_nearest(w, grid_slabs(w.shape[1], 1, None, "minmax"))
    return Quantized(tuple(w.shape), Chain(), bands, codes)


@pytest.mark.parametrize(("method", "name", "options"), [(Halves(), "halves", {"words": 16}), (binary, "binary", {})])
def test_any_callable_is_a_method(method, name, options, tmp_path):
    source, out = tiny_source(tmp_path / "in"), tmp_path / "out"
    report = quick_run(source, out, method)
    assert (report["method"], report["options"]) == (name, options)
    assert " at 0x" not in json.dumps(report)
    assert quantization(out)["quant_method"] == "voroq"
    model, _ = voroq.load(out, device="cpu")
    torch.testing.assert_close(logits(model), logits(dense_twin(original("Llama"), out)), rtol=1e-5, atol=1e-5)
    assert quick_run(source, out, method, resume=True) == report


def test_half_precision_checkpoints_store_half_precision_tables(tmp_path):
    source, out = tiny_source(tmp_path / "in"), tmp_path / "out"
    original("Llama").bfloat16().save_pretrained(source)
    quick_run(source, out, QUICK["vptq"])
    assert {t.dtype for name, t in tensors(out).items() if "centroids" in name} == {torch.bfloat16}
    model, _ = voroq.load(out, device="cpu")
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX"])
def test_a_model_saved_without_its_head_loads_as_such(name, tmp_path):
    source, out = tiny_source(tmp_path / "in", name), tmp_path / "out"
    base = original(name).base_model
    base.config.architectures = [type(base).__name__]
    base.save_pretrained(source)
    quick_run(source, out, QUICK["vptq"])
    model, _ = voroq.load(out, device="cpu")
    assert type(model) is type(base)
    with torch.no_grad():
        expected = dense_twin(base, out)(input_ids=tiny_tokens()).last_hidden_state
        torch.testing.assert_close(model(input_ids=tiny_tokens()).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_names_on_disk_may_lack_the_models_prefix(tmp_path):
    """Sites are stored by their names in the model, the rest under the names it had; loading finds both."""
    source, out = tiny_source(tmp_path / "in", "Bert"), tmp_path / "out"
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors(source).items()}
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    quick_run(source, out)
    assert {name.split(".")[0] for name in tensors(out)} == {"bert", "cls", "embeddings", "encoder"}
    model, _ = voroq.load(out, device="cpu")
    torch.testing.assert_close(logits(model), logits(dense_twin(original("Bert"), out)), rtol=1e-5, atol=1e-5)


class Ears(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def start(self, blocks: int, sites: int) -> None:
        self.heard.append(("start", blocks, sites))

    def site(self, name: str, seconds: float, loss: float) -> None:
        self.heard.append(("site", name))

    def warn(self, text: str) -> None:
        self.heard.append(("warn", text))

    def done(self) -> None:
        self.heard.append(("done",))


def test_a_run_tells_its_listener_every_site_and_every_note(tmp_path):
    ears = Ears()
    report = quick_run(tiny_source(tmp_path / "in"), tmp_path / "out", samples=1, progress=ears)
    assert ("start", 2, 14) in ears.heard
    assert [event[1] for event in ears.heard if event[0] == "site"] == [site["name"] for site in report["sites"]]
    assert sum(event[0] == "warn" and "use more samples" in event[1] for event in ears.heard) == 14
    assert ears.heard[-1] == ("done",)


def test_experts_stacked_on_disk_become_linears(tmp_path):
    """Whatever the names on disk are, sites go by their names in the model, and the stack is not copied."""
    source, out = tiny_source(tmp_path / "in", "Qwen3Moe"), tmp_path / "out"
    model = original("Qwen3Moe")
    for file in source.glob("*.safetensors"):
        file.unlink()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    quick_run(source, out)
    loaded, _ = voroq.load(out, device="cpu")
    assert any(isinstance(module, Experts) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), logits(dense_twin(model, out)), rtol=1e-5, atol=1e-5)


def test_public_names_are_the_same_objects():
    assert (voroq.RTN, voroq.GPTQ, voroq.VPTQ) == (RTN, GPTQ, VPTQ)
