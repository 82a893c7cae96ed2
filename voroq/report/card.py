"""The model card: the README.md of a quantized folder, made from the run's report.

It says what the model is, how to load it (with `import voroq` first: transformers alone would quietly start from random
weights), how it was made and, if someone measured, how good it is.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from voroq.packed.files import write_text
from voroq.report.inspect import Inspection, inspect_folder, read_report

# Fields of the original's card that hold for the quantized model too.
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")

LOADING = """```python
import voroq

model, tokenizer = voroq.load("{name}")
tokens = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(tokens, max_new_tokens=32)[0]))
```

or in transformers, **with `import voroq` before it** (without, transformers does not know the format and starts from random weights):

```python
import voroq
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```"""

DENSE_LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


@runtime_checkable
class Result(Protocol):
    """One measured text; `kl` and the rest are None where nothing was compared."""

    text: str
    perplexity: float
    perplexity_against: float | None
    kl: float | None
    top1: float | None
    tokens: int
    context: int


def write_card(folder: str | Path, results: Sequence[Result] = ()) -> None:
    """Write README.md into `folder` from its report, its headers and the original's card (where that is a local folder)."""
    report = read_report(folder)
    original = original_metadata(str(report.get("source", "")))
    text = model_card(report, inspect_folder(folder), original, Path(folder).resolve().name, results)
    write_text(Path(folder) / "README.md", text)


def write_converted_card(folder: str | Path, source: str | Path, name: str, changes: Sequence[str]) -> None:
    """Write README.md into `folder`, which is to be called `name` and is the model folder `source` written anew with these `changes`."""
    text = converted_card(read_report(source), inspect_folder(folder), _kept(Path(source), "base_model"), name, changes)
    write_text(Path(folder) / "README.md", text)


def original_metadata(source: str) -> dict[str, Any]:
    """What the card of the model in folder `source` says of license and language, and its name if it is a hub id; else {}."""
    if not Path(source).is_dir():
        return {"base_model": source} if source.count("/") == 1 and not source.startswith((".", "/", "~")) else {}
    return _kept(Path(source))


def _kept(folder: Path, *more: str) -> dict[str, Any]:
    """The fields KEPT, and `more`, of the card in a model folder."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        data = ModelCard(text).data.to_dict() if text.startswith("---") else {}
    except (ValueError, OSError, YAMLError):  # no card, or somebody else's damaged one, must not stop ours
        return {}
    return {key: data[key] for key in (*KEPT, *more) if data.get(key)}


def model_card(report: dict[str, Any], found: Inspection, original: dict[str, Any], name: str, results: Sequence[Result] = ()) -> str:
    """The card's text: metadata, loading, making, results."""
    parts = [
        _head(found, original),
        f"# {name}",
        f"{source_name(report)}, quantized by voroq to {_size(found)}",
        "## Loading",
        LOADING.format(name=name),
        "## Making",
        making(report, found),
    ]
    if results:
        parts += ["## Results", results_table(results)]
    return "\n\n".join(parts) + "\n"


def converted_card(report: dict[str, Any], found: Inspection, original: dict[str, Any], name: str, changes: Sequence[str]) -> str:
    """The text for a converted folder; `report` is that of the run that made the source, {} where another program did."""
    if found.quant_method is None:
        what, loading = "A quantized model as a plain one: its linears are dense again, and any program opens it.", DENSE_LOADING
    else:
        what, loading = f"A model quantized to {_size(found)}", LOADING
    parts = [
        _head(found, original),
        f"# {name}",
        what,
        "## Loading",
        loading.format(name=name),
        "## Making",
        "Written by `voroq convert` from a quantized folder: " + "; ".join(changes) + ".",
        making(report, found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Inspection, original: dict[str, Any]) -> str:
    plain = found.quant_method is None
    tags = ["voroq"] if plain else ["voroq", "quantized", found.quant_method]
    return f"---\n{ModelCardData(library_name='transformers' if plain else 'voroq', tags=tags, **original).to_yaml()}\n---"


def _size(found: Inspection) -> str:
    return (
        f"{found.bits_per_weight:.3f} bits per weight "
        f"(everything stored, over the {found.quantized_weights:,} weights of {len(found.sites)} linears; "
        f"{100 * found.unquantized_share:.1f} % of all parameters are kept as they were)."
    )


def source_name(report: dict[str, Any]) -> str:
    """The original's hub id, or the last part of its folder: where it lay on somebody's disk is nobody's business."""
    source = str(report.get("source") or "A model")
    return source if "base_model" in original_metadata(source) else Path(source).name


def making(report: dict[str, Any], found: Inspection) -> str:
    """Method, settings and data of the run, as a list; nothing that neither the report nor the files say."""
    calibration = report.get("calibration") or {}
    if isinstance(calibration, dict):
        calibration = ", ".join(f"{key} {value}" for key, value in calibration.items())
    options = report.get("options") or {}
    lines = {
        "method": report.get("method"),
        "options": ", ".join(f"{key}={value}" for key, value in options.items()) if isinstance(options, dict) else options,
        "settings": ", ".join(f"{words} ({count} linears)" for words, count in Counter(site.settings for site in found.sites).items()),
        "channels": _narrowed(report.get("share_of_weights"), found.bits_per_weight),
        "calibration": calibration,
        "mode": report.get("mode"),
        "tuning": _tuning(report.get("tuning")),
        "seed": report.get("seed"),
        "voroq": report.get("version"),
        "seconds": f"{report['seconds']:.0f}" if "seconds" in report else None,
    }
    return "\n".join(f"- {key}: {value}" for key, value in lines.items() if value not in (None, ""))


def _narrowed(share: Any, bits: float) -> str | None:
    if not isinstance(share, float) or share == 1:
        return None
    return f"some left out; {100 * share:.1f} % of the original's weights are left, {share * bits:.3f} bits for each that it had"


def _tuning(tuning: Any) -> str | None:
    if not isinstance(tuning, dict) or not {"steps", "kl_before", "kl_after"} <= tuning.keys():
        return None
    moved = ", codes moved" if tuning.get("moves") else ""
    return (
        f"{tuning['steps']} steps towards the original's logits{moved}; KL on held-out calibration text "
        f"{tuning['kl_before']:.4f} before, {tuning['kl_after']:.4f} after"
    )


def results_table(results: Sequence[Result]) -> str:
    """A Markdown table with one row per text."""
    compared = all(result.kl is not None for result in results)
    header = ["text", "context", "tokens", "perplexity", *(["original", "KL (nats/token)", "top-1"] if compared else [])]
    rows = [
        [
            result.text,
            str(result.context),
            str(result.tokens),
            f"{result.perplexity:.3f}",
            *([f"{result.perplexity_against:.3f}", f"{result.kl:.4f}", f"{100 * result.top1:.1f} %"] if compared else []),
        ]
        for result in results
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
