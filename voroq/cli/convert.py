"""`voroq convert` and `voroq verify`: a quantized folder in another form, and whether a folder is what it should be."""

import re
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from voroq.cli import options
from voroq.cli.console import emit, err, size
from voroq.errors import VoroqError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Layout(StrEnum):
    vptq = "vptq"
    dense = "dense"


def parse_size(text: str) -> int:
    """"5GB" as bytes. Raises VoroqError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get((match[2] or "B").upper()) if match else None
    if unit is None or float(match[1]) * unit < 1:
        raise VoroqError(f"--shard-size {text} is no size: write for example 5GB or 500MB")
    return int(float(match[1]) * unit)


def convert(
    model: options.Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.", show_default=False)],
    to: Annotated[
        Layout | None,
        typer.Option(help="vptq: the official layout as of today. dense: a plain model. Default: the layout it has.", show_default=False),
    ] = None,
    absorb: Annotated[
        bool, typer.Option("--absorb-perm/--keep-perm", help="Store columns in the weight's order where that makes a permutation needless.")
    ] = True,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|float16|bfloat16", help="Round real numbers to this type. Default: leave them.", show_default=False),
    ] = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Write the quantized MODEL again as OUT: older VPTQ layouts and GPTQModel's VPTQ in the current one, or as a plain dense model.

    The weights of every linear stay the same to the bit, unless --dtype asks for another type. A dense model is bfloat16 if MODEL is, else
    what its tables are, and opens anywhere without voroq. The model is never in memory as a whole.

    [bold]Examples[/]

      voroq convert old-model new-model

      voroq convert out plain --to dense

      voroq convert out smaller-files --keep-perm --shard-size 500MB
    """
    limit = parse_size(shard_size)
    from voroq.convert import convert as run
    from voroq.packed.hub import locate

    def progress(done: int, of: int) -> None:
        err().print(f"shard {done}/{of}")

    done = run(locate(model, revision=revision), out, to=to and to.value, absorb=absorb, shard_bytes=limit, dtype=dtype, progress=progress)
    what = "dense" if done.layout == "dense" else f"in the {done.layout} layout"
    counts = f"{done.linears} linears {what}, {done.changed} changed, {done.absorbed} permutations absorbed"
    emit(asdict(done), as_json, f"{done.path}: {counts}; {size(done.bytes_before)} before, {size(done.bytes_after)} now")


def verify(model: options.Model, revision: options.Revision = None, as_json: options.Json = False) -> None:
    """Check everything about the files of MODEL and list all that is wrong: headers, shapes, codes, numbers, hashes, missing tensors.

    The exit code is 0 if all is well, 1 if there are defects, 2 if MODEL is no model folder. Every tensor is read once, none is computed
    with. Hashes are compared where voroq wrote the folder (voroq_report.json). Files in sub-folders are no part of a model: an index that
    names one is a defect.

    [bold]Examples[/]

      voroq verify out

      voroq verify out --json | jq -r '.defects[].problem'
    """
    from voroq.packed.hub import locate
    from voroq.report.verify import verification_view, verify_folder

    found = verify_folder(locate(model, revision=revision))
    emit(asdict(found), as_json, *(() if as_json else (verification_view(found),)))
    if found.defects:
        raise typer.Exit(1)
