"""`voroq bench`: how fast a model reads and writes."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from voroq.cli import options
from voroq.cli.console import emit, size

FASTER = {"cpu": "the library", "cuda": "torch, linears of one input together"}
"""Who makes the steps of a model that `speed_up` took."""


def bench(
    model: options.Model,
    against: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="Another model, measured in turns with MODEL.", show_default=False)
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="Sequences at once; repeatable. Default: 1, 4 and 16.", show_default=False)
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens written after it.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds; the best of them counts.")] = 3,
    expand: Annotated[bool, typer.Option("--expand", help="Load MODEL's pyramids spelled out, as integers of 4 or 8 bits.")] = False,
    native_steps: Annotated[
        bool,
        typer.Option(
            "--native-steps/--torch-steps",
            help="On the CPU: one call of the library for a token, or operation by operation. On GPUs: linears of one input at once.",
        ),
    ] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Measure prefill and decoding in tokens per second, the weights' bytes, the most memory taken, and the share of its bandwidth in use.

    The limit is what copying reaches on this device: no step of decoding is faster than reading all weights once. With --against both
    models are measured in turns, so that whatever else runs hits both; --dtype holds for both.

    [bold]Examples[/]

      voroq bench out --against meta-llama/Llama-3.2-1B --dtype bfloat16

      voroq bench out --expand --batch 1

      VOROQ_KERNEL=reference voroq bench out --batch 1 --json
    """
    from voroq.evaluation.models import open_model
    from voroq.evaluation.speed import measure
    from voroq.integrations.decoder import speed_up

    names = [model] if against in (None, model) else [model, against]
    opening = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    own = {"revision": revision, "expand": expand}
    opened = {name: open_model(name, **opening, **(own if name == model else {}))[0] for name in names}
    steps = {name: "torch" for name in names}
    if native_steps:
        steps = {name: "torch, as " + why if (why := speed_up(one)) else FASTER[one.device.type] for name, one in opened.items()}
    found = measure(opened, batches=tuple(batch or (1, 4, 16)), prompt=prompt, new=new, repeats=repeats)
    where = f"{found.device}, {found.threads} threads, copying {found.bandwidth / 1e9:.1f} GB/s"
    weights = ", ".join(f"{name} {size(count)}" for name, count in found.weights.items())
    places = {"rss": "of memory", "cuda": "on the GPU"}
    peaks = ", ".join(f"{count / 1e9:.2f} GB {places[name]}" for name, count in found.peak.items() if count)
    table = Table("model")
    for column in ("batch", "prefill tokens/s", "decode tokens/s", "of the limit"):
        table.add_column(column, justify="right")
    for speed in found.speeds:
        decode = ("-", "-") if speed.decode is None else (f"{speed.decode:.1f}", f"{100 * speed.of_limit:.1f} %")
        table.add_row(speed.model, str(speed.batch), f"{speed.prefill:.1f}", *decode)
    by = ", ".join(f"{name}: {how}" for name, how in steps.items())
    summary = Text(f"{where}; weights: {weights}; at most {peaks} in all; steps of one token by {by}")
    emit(asdict(found) | {"steps": steps}, as_json, summary, table)
