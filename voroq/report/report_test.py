"""Inspection and card of a small folder quantized by hand: two layouts, every number checked against the files."""

import json
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from voroq.codebook.grid import Grid
from voroq.codebook.residual import Residual
from voroq.codebook.table import Table
from voroq.errors import FormatError, VoroqError
from voroq.packed.checkpoint import quantization_config
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.format import pack
from voroq.packed.native_format import NativeSpec
from voroq.quantized import Band, Quantized, Tile
from voroq.report.card import model_card, original_metadata, write_card
from voroq.report.inspect import inspect_folder, inspection_view, read_report, settings
from voroq.transform.chain import Chain
from voroq.transform.permute import Permute

OUT, IN = 12, 64


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def vectors() -> Quantized:
    """v4 k16+4 with a permutation."""
    g = generator()
    book = Residual((Table(torch.randn(16, 4, generator=g)), Table(torch.randn(4, 4, generator=g))))
    codes = torch.stack([torch.randint(16, (3, IN), generator=g), torch.randint(4, (3, IN), generator=g)], dim=-1)
    return Quantized((OUT, IN), Chain((Permute(torch.randperm(IN, generator=g)),)), (Band(0, IN, Tile(4, 1), book),), (codes,))


def grid() -> Quantized:
    """3 bits in groups of 32 columns."""
    g = generator()
    bands = tuple(Band(a, a + 32, Tile(1, 1), Grid(3), torch.rand(OUT, generator=g) + 0.1, torch.full((OUT,), 3.0)) for a in (0, 32))
    return Quantized((OUT, IN), Chain(), bands, tuple(torch.randint(8, (OUT, 32, 1), generator=g) for _ in bands))


def folder_of(path: Path, layout: str, quantized: Quantized) -> Path:
    packed = pack(quantized, torch.float16, layout)
    kept = {"embed.weight": torch.ones(10, IN, dtype=torch.float16), "layers.0.q_proj.bias": torch.ones(OUT, dtype=torch.float16)}
    tensors = {**{f"layers.0.q_proj.{name}": t for name, t in packed.tensors.items()}, **kept}
    path.mkdir()
    write_safetensors(path / "model.safetensors", [Entry.of(name, t) for name, t in tensors.items()], {"format": "pt"})
    config = quantization_config(layout, {"layers.0.q_proj": packed.spec}, biased=["layers.0.q_proj"])
    write_json(path / "config.json", {"model_type": "llama", "quantization_config": config})
    return path


@pytest.fixture(params=["vptq", "voroq"])
def folder(request, tmp_path):
    return folder_of(tmp_path / "made", request.param, vectors() if request.param == "vptq" else grid())


def test_bits_per_weight_count_every_stored_byte_of_the_sites(folder):
    found = inspect_folder(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    site = [t for name, t in tensors.items() if name.startswith("layers.0.q_proj.") and not name.endswith(".bias")]
    assert found.quantized_bytes == sum(t.numel() * t.element_size() for t in site)
    assert found.bits_per_weight == found.sites[0].bits_per_weight == 8 * found.quantized_bytes / (OUT * IN)
    assert found.quantized_weights == OUT * IN
    assert found.unquantized_bytes == 2 * (10 * IN + OUT)
    assert found.unquantized_share == (10 * IN + OUT) / (10 * IN + OUT + OUT * IN)
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size
    assert {rest.name: prod(rest.shape) for rest in found.unquantized} == {"embed.weight": 10 * IN, "layers.0.q_proj.bias": OUT}


def test_settings_read_like_the_field_writes_them(tmp_path):
    assert inspect_folder(folder_of(tmp_path / "a", "vptq", vectors())).sites[0].settings == "v4 k16+4 perm"
    assert inspect_folder(folder_of(tmp_path / "b", "voroq", grid())).sites[0].settings == "3 bit g32"
    assert inspect_folder(folder_of(tmp_path / "c", "voroq", vectors())).sites[0].settings == "4x1 k16+4, permute"


def test_the_report_lends_its_losses_and_method(folder):
    assert inspect_folder(folder).sites[0].loss is None
    (folder / "voroq_report.json").write_text(json.dumps({"method": "vptq", "sites": [{"name": "layers.0.q_proj", "loss": 0.25}]}))
    found = inspect_folder(folder)
    assert (found.method, found.sites[0].loss) == ("vptq", 0.25)


def test_the_view_shows_sites_totals_and_what_is_kept(folder):
    with (console := Console(width=120)).capture() as capture:
        console.print(inspection_view(inspect_folder(folder)))
    text = capture.get()
    for word in ["layers.0.q_proj", "12x64", "bits per weight", "kept as it was", "embed.weight", "layers.*.q_proj.bias"]:
        assert word in text


def test_damaged_folders_are_refused(folder):
    (folder / "voroq_report.json").write_text("{")
    with pytest.raises(VoroqError, match=r"voroq_report\.json is damaged"):
        read_report(folder)
    (folder / "voroq_report.json").unlink()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-7])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        inspect_folder(folder)
    with pytest.raises(VoroqError, match=r"no config\.json"):
        inspect_folder(folder / "nowhere")


def result(**change) -> SimpleNamespace:
    values = {"text": "c4", "perplexity": 12.0, "perplexity_against": 11.0, "kl": 0.05, "top1": 0.9, "tokens": 100, "context": 256}
    return SimpleNamespace(**{**values, **change})


def test_the_card_says_how_to_load_how_it_was_made_and_how_good_it_is(folder, tmp_path):
    original = tmp_path / "original"
    original.mkdir()
    (original / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags: [secret]\n---\n# Original\n")
    report = {"source": str(original), "method": "vptq", "options": {"damping": 0.01}, "seed": 7, "version": "0.1.0", "seconds": 33.3}
    (folder / "voroq_report.json").write_text(
        json.dumps({**report, "calibration": {"text": "calibration-c4", "samples": 512}, "sites": []})
    )
    write_card(folder, [result()])
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    header = card.split("---\n")[1]
    assert "license: mit" in header
    assert "language: en" in header
    assert "library_name: voroq" in header
    assert "secret" not in header
    assert card.index("import voroq\n") < card.index("from transformers import")
    assert f"{inspect_folder(folder).bits_per_weight:.3f} bits per weight" in card
    for line in [
        "- method: vptq",
        "- options: damping=0.01",
        "- seed: 7",
        "- seconds: 33",
        "- calibration: text calibration-c4, samples 512",
    ]:
        assert line in card.splitlines()
    settings = inspect_folder(folder).sites[0].settings
    assert f"- settings: {settings} (1 linears)" in card.splitlines()
    assert "original, quantized by voroq" in card
    assert str(tmp_path) not in card
    assert "| c4 | 256 | 100 | 12.000 | 11.000 | 0.0500 | 90.0 % |" in card


def test_a_card_without_report_or_results_claims_nothing(folder):
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert "## Results" not in card
    assert "None" not in card
    assert "tuning" not in card
    tuned = model_card({"tuning": {"steps": 9, "moves": 0.1, "kl_before": 0.2, "kl_after": 0.1}}, inspect_folder(folder), {}, "x")
    assert "9 steps towards the original's logits, codes moved; KL on held-out calibration text 0.2000 before, 0.1000 after" in tuned
    alone = model_card({}, inspect_folder(folder), {}, "x", [result(kl=None, top1=None, perplexity_against=None)])
    assert "| c4 | 256 | 100 | 12.000 |" in alone


def test_the_original_is_named_only_by_its_hub_id(tmp_path):
    assert original_metadata("org/model") == {"base_model": "org/model"}
    assert original_metadata("./org/model") == {}
    assert original_metadata(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert original_metadata(str(tmp_path)) == {}


def test_pyramids_are_named_with_the_bits_of_a_vector():
    form = {"kind": "pyramids", "dim": 16, "bits": 52, "pulses": [28, 31], "order": "split-v1"}
    band = {"count": 1, "columns": 4, "tile": [16, 1], "codebook": form, "scale": True, "zero": False}
    spec = NativeSpec.from_json({"shape": [32, 4], "transform": [{"kind": "rotate_in"}], "bands": [band]}, "m")
    assert settings(spec) == "16x1 pyramids 52 bits, rotate_in"
