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


def original_metadata(source: str) -> dict[str, Any]:
    """What the card of the model in folder `source` says of license and language, and its name if it is a hub id; else {}."""
    path = Path(source)
    if not path.is_dir():
        return {"base_model": source} if source.count("/") == 1 and not source.startswith((".", "/", "~")) else {}
    try:
        text = (path / "README.md").read_text(encoding="utf-8")
        data = ModelCard(text).data.to_dict() if text.startswith("---") else {}
    except (ValueError, OSError, YAMLError):  # no card, or somebody else's damaged one, must not stop ours
        return {}
    return {key: data[key] for key in KEPT if data.get(key)}


def model_card(report: dict[str, Any], found: Inspection, original: dict[str, Any], name: str, results: Sequence[Result] = ()) -> str:
    """The card's text: metadata, loading, making, results."""
    data = ModelCardData(library_name="voroq", tags=["voroq", "quantized", str(found.quant_method)], **original)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{source_name(report)}, quantized by voroq to {found.bits_per_weight:.3f} bits per weight "
        f"(everything stored, over the {found.quantized_weights:,} weights of {len(found.sites)} linears; "
        f"{100 * found.unquantized_share:.1f} % of all parameters are kept as they were).",
        "## Loading",
        LOADING.format(name=name),
        "## Making",
        making(report, found),
    ]
    if results:
        parts += ["## Results", results_table(results)]
    return "\n\n".join(parts) + "\n"


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
        "calibration": calibration,
        "mode": report.get("mode"),
        "tuning": _tuning(report.get("tuning")),
        "seed": report.get("seed"),
        "voroq": report.get("version"),
        "seconds": f"{report['seconds']:.0f}" if "seconds" in report else None,
    }
    return "\n".join(f"- {key}: {value}" for key, value in lines.items() if value not in (None, ""))


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
