"""`voroq prune`: the same model without the channels that are worth next to nothing."""

from typing import Annotated

import typer
from rich.table import Table

from voroq.cli import options
from voroq.cli.console import duration, emit, err
from voroq.cli.progress import terminal_progress
from voroq.cli.quantize import CalibrationSource, Context, Samples


def prune(
    model: options.Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new folder to write.", show_default=False)],
    channels: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Channels of every MLP to keep. Default: 15 of 16.", show_default=False),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Steps of tuning what is left towards MODEL, two models in memory; 0 = none."),
    ] = 0,
    calibration: CalibrationSource = None,
    samples: Samples = None,
    context: Context = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Write MODEL to OUT without the cheapest channels of its MLPs, the others answering for them.

    OUT is an ordinary model of the same architecture, a little narrower, near the function of MODEL: to be quantized with the bits that the
    channels would have taken (`--bits` counts bits per weight of OUT), and tuned towards MODEL (`--teacher`). Whether that wins depends
    on the model: `voroq eval OUT --against MODEL` says what leaving out alone costs.

    [bold]Examples[/]

      voroq prune ./my-model pruned --channels 10240

      voroq prune ./my-model pruned --channels 9216 --steps 300

      voroq quantize pruned out --bits 2.2 --teacher ./my-model
    """
    from voroq.pipeline.prune import prune_model

    given = {"steps": steps, "calibration": calibration or None, "samples": samples, "context": context, "device": device, "seed": seed}
    with terminal_progress(err()) as progress:
        report = prune_model(
            model, out, channels=channels, revision=revision, trust_remote_code=trust_remote_code, progress=progress, **given
        )
    emit(report, as_json, summary(report, out))


def summary(report: dict, out: str) -> Table:
    """What was left out, in a few lines."""
    table = Table(show_header=False, box=None)
    table.add_row("written to", out)
    table.add_row("channels", f"{report['channels']} of {report['of']} in every MLP")
    table.add_row("weights", f"{report['weights']}, {100 * report['share_of_weights']:.1f} % of the blocks' linears")
    table.add_row("lost", f"{100 * max(report['lost']):.2g} % of an MLP's output (mean square), at most")
    if report["tuning"]:
        found = report["tuning"]
        table.add_row("tuned", f"{found['steps']} steps: KL to {report['source']} {found['kl_before']:.4f} -> {found['kl_after']:.4f}")
    table.add_row("time", duration(report["seconds"]))
    table.add_row("check it", f"voroq eval {out} --against {report['source']}")
    return table
