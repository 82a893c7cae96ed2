"""`voroq plan`: bits where they are worth most."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from voroq.cli import options
from voroq.cli.console import emit, err
from voroq.cli.progress import terminal_progress
from voroq.cli.quantize import CalibrationSource, Context, Option, parse_options
from voroq.errors import VoroqError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """ "4GB" as bytes. Raises VoroqError for what is no size."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise VoroqError(f"--size {text} is not a size: write for example --size 4GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def plan(
    model: options.Model,
    out: Annotated[str, typer.Argument(metavar="PLAN", help="The file to write, for voroq quantize --plan.")] = "plan.json",
    method: Annotated[str, typer.Option(metavar="vptq|pvq|gptq|rtn", help="How; see voroq methods.")] = "vptq",
    bits: Annotated[
        float | None, typer.Option(metavar="B", help="Bits per weight at most, everything stored counted.", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Instead: size of all files, for example 4GB.", show_default=False)
    ] = None,
    option: Option = None,
    calibration: CalibrationSource = None,
    samples: Annotated[int | None, typer.Option(min=1, metavar="N", help="Windows of that text. Default: 64.", show_default=False)] = None,
    context: Context = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Choose settings for every linear of MODEL under a budget, by what an error in each costs the model.

    Every linear is rounded once and its error weighed with the gradients of the model's own answers: one pass forward and one
    backward, block by block. What that predicts for other settings is put together by dynamic programming. PLAN is JSON with an
    entry per linear; edit it as you like ("name" may be a glob, "method" null leaves a linear alone).

    [bold]Examples[/]

      voroq plan meta-llama/Llama-3.2-1B plan.json --bits 2.1

      voroq quantize meta-llama/Llama-3.2-1B out --plan plan.json

      voroq plan ./my-model plan.json --size 4GB --method pvq
    """
    pairs = parse_options(option or [])
    if (bits is None) == (size is None):
        raise VoroqError("give either --bits or --size, for example --bits 2.1")
    from voroq.pipeline.plan import make_plan
    from voroq.pipeline.planning import plan_model

    budget = make_plan(method, bits or 4.0, pairs)
    with terminal_progress(err()) as progress:
        planned = plan_model(
            model,
            budget,
            size=None if size is None else parse_size(size),
            calibration=calibration or None,
            samples=samples,
            context=context,
            device=device,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    planned.write(Path(out), model)
    report = {"written": out, "bits_per_weight": planned.bits_per_weight, "kl": planned.kl, "sites": list(planned.rows)}
    emit(report, as_json, table(planned.rows, planned.bits_per_weight, planned.kl), f"written to {out}")


def table(rows: tuple[dict, ...], bits: float, kl: float) -> Table:
    """A line per linear, and all together."""
    shown = Table(show_footer=True)
    shown.add_column("linear", footer="all")
    shown.add_column("shape", justify="right")
    shown.add_column("settings")
    shown.add_column("bits", justify="right", footer=f"{bits:.3f}")
    shown.add_column("expected KL", justify="right", footer=f"{kl:.4f}")
    for row in rows:
        settings = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        shown.add_row(row["name"], f"{row['shape'][0]} x {row['shape'][1]}", settings, f"{row['bits']:.3f}", f"{row['kl']:.5f}")
    return shown
