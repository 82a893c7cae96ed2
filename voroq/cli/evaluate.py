"""`voroq eval`: perplexity, and the distance to the original."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from voroq.cli import options
from voroq.cli.console import emit, err

Against = Annotated[
    str | None, typer.Option(metavar="ORIGINAL", help="The model before quantization; adds KL and top-1 agreement.", show_default=False)
]
Texts = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="wikitext2 (default), books, c4, or a .txt/.jsonl/.json file; repeatable.", show_default=False),
]
Context = Annotated[
    int | None, typer.Option(min=2, metavar="N", help="Tokens in a window. Default: the model's, at most 2048.", show_default=False)
]
Windows = Annotated[int | None, typer.Option(min=1, metavar="N", help="Windows from each text. Default: all.", show_default=False)]
Batch = Annotated[int | None, typer.Option(min=1, metavar="N", help="Windows at once. Default: a few.", show_default=False)]


def evaluate(
    model: options.Model,
    against: Against = None,
    text: Texts = None,
    context: Context = None,
    windows: Windows = None,
    batch: Batch = None,
    activation_bits: options.ActivationBits = None,
    activation_kind: options.ActivationKind = "integers",
    cache_bits: options.CacheBits = None,
    cache_recent: options.CacheRecent = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity; with --against also KL divergence and agreement with the original.

    Windows do not overlap, start at the text's beginning and get no special tokens; log-softmax is in float32. KL is the mean
    over all predictions of KL(original || MODEL), in nats per token; top1 is how often both prefer the same token.
    With --cache-bits, MODEL reads the tokens of a window 16 at a time and what lies before them from the quantized cache.
    With --activation-bits, MODEL (native layout) rounds the inputs of its linears, as a model quantized with that option does.
    With several texts, the first line of the JSON is all of them together and "texts" has each.

    [bold]Examples[/]

      voroq eval out --against meta-llama/Llama-3.2-1B

      voroq eval out --against meta-llama/Llama-3.2-1B --cache-bits 3

      voroq eval out --text wikitext2 --text my-text.txt --context 2048 --windows 50 --json
    """
    from voroq.evaluation.texts import evaluation_text

    texts = text or ["wikitext2"]
    for name in texts:  # a wrong name should not cost the loading of a model
        evaluation_text(name)
    from voroq.evaluation.cached import Cached
    from voroq.evaluation.compare import compare

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=err(), transient=True, disable=not err().is_terminal
    ) as bar:
        tasks: dict[str, object] = {}

        def tick(name: str, count: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.advance(tasks[name], count)

        comparison = compare(
            model,
            texts,
            against=against,
            context=context,
            windows=windows,
            batch=batch,
            opening={"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code, "revision": revision},
            change=_rounding(activation_bits, activation_kind),
            through=None if cache_bits is None else Cached(cache_bits, cache_recent),
            tick=tick,
        )
    from voroq.pipeline.source import open_source
    from voroq.report.inspect import inspect_folder

    bits = inspect_folder(open_source(model, revision=revision).folder).bits_per_weight
    found = {**asdict(comparison), "bits_per_weight": bits, "cache_bits": cache_bits, "activation_bits": activation_bits}
    title = f"{model}: {bits:.3f} bits per weight, context {comparison.context}"
    emit(found, as_json, Text(title), view(found))


def _rounding(bits: int | None, kind: str) -> Callable[[Any], None] | None:
    """What makes a loaded model round its inputs, None where that was not asked for."""
    if bits is None:
        return None
    from voroq.activations import Activations
    from voroq.front import round_inputs

    return partial(round_inputs, activations=Activations(bits, kind))


def view(found: dict) -> Table:
    """One row per text."""
    table = Table("text")
    for column in ["perplexity", "original", "KL", "top-1", "tokens"]:
        table.add_column(column, justify="right")
    for row in found["texts"]:
        other = ["-"] * 3 if row["kl"] is None else [f"{row['perplexity_against']:.4f}", f"{row['kl']:.4f}", f"{100 * row['top1']:.1f} %"]
        table.add_row(row["text"], f"{row['perplexity']:.4f}", *other, str(row["tokens"]))
    return table
