"""`voroq demo`: everything at once, offline, on the small model that comes with the package."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from voroq.cli import options
from voroq.cli.console import emit, err, size
from voroq.cli.progress import terminal_progress
from voroq.errors import VoroqError

# Its presence says that this folder was made by the demo and may be replaced by it.
MARK = ".voroq-demo"
TEXTS = ("wikitext2", "c4")
# The model was trained on windows of 256 tokens; 100 of them are what its published numbers were measured on.
CONTEXT, WINDOWS = 256, 100
CALIBRATION, SAMPLES, EFFORT = "calibration-c4", 256, "balanced"
PROMPT = "The old man looked at the sea and"
NEW_TOKENS = 60


def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write; an earlier demo there is replaced.")] = "voroq-demo",
    bits: Annotated[float, typer.Option(metavar="B", help="Bits per weight at most, everything stored counted.")] = 2.1,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of 256 tokens to measure on, per text.")] = WINDOWS,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Quantize the bundled model as voroq quantize does, measure original and result side by side, and let both write.

    Needs no network and about five minutes on two CPU cores. The quantized model stays in DIR/model.

    [bold]Examples[/]

      voroq demo

      voroq demo --bits 3 --out demo-3bit
    """
    folder = prepare(Path(out))
    from voroq.evaluation.compare import compare
    from voroq.pipeline.effort import EFFORTS
    from voroq.pipeline.plan import make_plan
    from voroq.pipeline.text import DEMO_MODEL
    from voroq.prelude import quantize_with
    from voroq.report.card import write_card
    from voroq.report.inspect import inspect_folder

    effort = EFFORTS[EFFORT]
    plan = make_plan("vptq", bits, effort.completed("vptq", {}))
    made = str(folder / "model")
    text = {"calibration": CALIBRATION, "samples": SAMPLES, "context": CONTEXT}
    with terminal_progress(err()) as progress:
        report = quantize_with(effort, str(DEMO_MODEL), made, plan, device=device, seed=seed, progress=progress, **text)
    err().print("measuring both models")
    opening = {"device": device, "dtype": "float32"}
    comparison = compare(made, list(TEXTS), against=DEMO_MODEL, context=CONTEXT, windows=windows, opening=opening)
    write_card(made, comparison.texts)
    before, after = inspect_folder(DEMO_MODEL), inspect_folder(made)
    texts = {text.text: text for text in comparison.texts}
    found = {
        "original": {
            "bits_per_weight": before.bits_per_weight,
            "file_bytes": before.file_bytes,
            "perplexity": {name: text.perplexity_against for name, text in texts.items()},
        },
        "quantized": {
            "bits_per_weight": report["share_of_weights"] * after.bits_per_weight,
            "file_bytes": after.file_bytes,
            "perplexity": {name: text.perplexity for name, text in texts.items()},
            "kl": comparison.kl,
            "top1": comparison.top1,
            "seconds": report["seconds"],
            "peak_memory": report["peak_memory"],
        },
        "tokens": comparison.tokens,
        "context": CONTEXT,
        "prompt": PROMPT,
        "continuations": {"original": write(str(DEMO_MODEL), device, seed), "quantized": write(made, device, seed)},
        "folder": made,
    }
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    emit(found, as_json, *continuations(found), comparison_table(found))


def prepare(folder: Path) -> Path:
    """`folder`, empty but for the mark. Raises VoroqError if it holds anything that is not an earlier demo's."""
    if folder.exists() and not folder.is_dir():
        raise VoroqError(f"{folder} is a file: give --out a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise VoroqError(f"{folder} exists and was not written by voroq demo: give --out a new folder, or remove this one yourself")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    if (folder / "model").exists():
        shutil.rmtree(folder / "model")
    (folder / "results.json").unlink(missing_ok=True)
    return folder


def write(model: str, device: str, seed: int) -> str:
    """What `model` makes of the prompt."""
    from voroq.evaluation import generation
    from voroq.evaluation.models import open_model

    opened, tokenizer = open_model(model, device=device, dtype="float32")
    tokens = generation.prompt_tokens(tokenizer, PROMPT)
    return generation.generate(opened, tokenizer, tokens, max_new_tokens=NEW_TOKENS, seed=seed).text


def continuations(found: dict) -> list[Text]:
    """What each model wrote, as text for the console."""
    return [Text.assemble((name, "bold"), f": {found['prompt']}{text}\n") for name, text in found["continuations"].items()]


def comparison_table(found: dict) -> Table:
    """Original and quantized model side by side."""
    before, after = found["original"], found["quantized"]
    memory = after["peak_memory"]["rss"]
    table = Table("a Llama of 11 M parameters, by VPTQ")
    table.add_column("original", justify="right")
    table.add_column("quantized", justify="right")
    bits = [f"{model['bits_per_weight']:.3f}" for model in (before, after)]
    table.add_row("bits per weight of the original's linears, everything stored", *bits)
    table.add_row("file size", size(before["file_bytes"]), size(after["file_bytes"]))
    for name in TEXTS:
        perplexities = [f"{model['perplexity'][name]:.2f}" for model in (before, after)]
        table.add_row(f"perplexity, {name} (context {found['context']})", *perplexities)
    table.add_row("KL divergence to the original (nats per token)", "0", f"{after['kl']:.4f}")
    table.add_row("same best token as the original", "100 %", f"{100 * after['top1']:.1f} %")
    table.add_row("seconds to quantize", "-", f"{after['seconds']:.1f}")
    table.add_row("peak memory while quantizing", "-", "-" if memory is None else size(memory))
    return table
