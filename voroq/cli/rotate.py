"""`voroq rotate`: the same model in a basis without outliers."""

from typing import Annotated

import typer
from rich.table import Table

from voroq.cli import options
from voroq.cli.console import duration, emit, err, size
from voroq.cli.progress import terminal_progress


def rotate(
    model: options.Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new folder to write.", show_default=False)],
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Rotate the values of attention too, head by head.")] = True,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float16|bfloat16|float32|float64", help="Stored precision. Default: MODEL's own.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Write MODEL to OUT with its residual stream and its value heads randomly rotated.

    OUT is an ordinary model of the same architecture that computes the same function but for rounding: the rotations (randomised
    Hadamard) and the gains of the norms are folded into the weights. Needs RMS norms before every linear that reads the stream
    (Llama, Mistral, Qwen2 and 3, Phi-3, Granite, GLM, Gemma 1); other models are refused. Whether it helps depends on model and
    method: quantize both, and compare.

    [bold]Examples[/]

      voroq rotate ./my-model rotated

      voroq rotate ./my-model rotated --dtype float32 && voroq eval rotated --against ./my-model
    """
    from voroq.pipeline.rotate import rotate_model

    with terminal_progress(err()) as progress:
        report = rotate_model(
            model, out, seed=seed, heads=heads, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, progress=progress
        )
    emit(report, as_json, summary(report, out))


def summary(report: dict, out: str) -> Table:
    """What was rotated, in a few lines."""
    table = Table(show_header=False, box=None)
    table.add_row("written to", out)
    blocks = "" if report["block"] == report["width"] else f", in blocks of {report['block']}"
    table.add_row("residual stream", f"{report['width']} wide{blocks}; {report['readers']} readers, {report['writers']} writers")
    table.add_row("value heads", f"{report['heads']} blocks, heads of {report['head_dim']}" if report["heads"] else "as they were")
    if report["untied"]:
        table.add_row("head", "no longer tied to the embedding")
    table.add_row("size", size(report["bytes"]))
    table.add_row("time", duration(report["seconds"]))
    table.add_row("check it", f"voroq eval {out} --against {report['source']}")
    return table
