"""`voroq write`: calibration text by the model itself."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from voroq.cli import options
from voroq.cli.console import duration, emit, err
from voroq.cli.progress import terminal_progress
from voroq.errors import VoroqError


def write(
    model: options.Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .jsonl file to write.", show_default=False)],
    documents: Annotated[int, typer.Option(min=1, metavar="N", help="How many.")] = 2048,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each at most.")] = 256,
    begin: Annotated[
        str, typer.Option(metavar="bos|anywhere", help="After the token that texts begin with, or with any: amid all kinds of text.")
    ] = "bos",
    temperature: Annotated[float, typer.Option(metavar="T", help="1 writes as the model says; less is tamer, and narrower.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Documents at once.")] = 256,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Let MODEL write text to calibrate on, from one token on, one document a row.

    A calibration text says little of what it does not hold: a model that was trained on books and is calibrated on web pages loses most
    where it reads books. What a model writes at temperature 1 is what it was trained on, as far as it remembers. Give it beside
    a real text (`--calibration` is repeatable), for tunings most of all.

    [bold]Examples[/]

      voroq write ./my-model own.jsonl

      voroq write ./my-model more.jsonl --begin anywhere --documents 1024

      voroq quantize ./my-model out --bits 2.1 --effort best --calibration calibration-mixed --calibration own.jsonl
    """
    from voroq.evaluation.generation import documents as written
    from voroq.evaluation.generation import write_documents
    from voroq.evaluation.models import open_model

    if file.suffix != ".jsonl":
        raise VoroqError(f"{file} is not a name for rows of JSON: give one that ends in .jsonl")
    if not file.parent.is_dir():
        raise VoroqError(f"there is no folder {file.parent} to write {file.name} into: make it first")
    began = time.perf_counter()
    opened, tokenizer = open_model(model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    how = {"tokens": tokens, "begin": begin, "batch": batch, "temperature": temperature, "seed": seed}
    texts: list[str] = []
    with terminal_progress(err()) as progress:
        for more in written(opened, tokenizer, documents, **how):
            texts += more
            progress.stage(f"{len(texts)} of {documents} documents written")
    write_documents(file, texts)
    report = {"file": str(file), "documents": len(texts), "characters": sum(map(len, texts)), "seconds": time.perf_counter() - began}
    emit(report, as_json, summary(report))


def summary(report: dict) -> Table:
    """What was written, in a few lines."""
    table = Table(show_header=False, box=None)
    table.add_row("written to", report["file"])
    table.add_row("documents", f"{report['documents']}, {report['characters']} characters")
    table.add_row("time", duration(report["seconds"]))
    table.add_row("calibrate on it", f"--calibration {report['file']}")
    return table
