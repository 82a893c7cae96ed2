"""`voroq inspect`: what is in a model folder."""

from dataclasses import asdict

from voroq.cli import options
from voroq.cli.console import emit


def inspect(model: options.Model, revision: options.Revision = None, as_json: options.Json = False) -> None:
    """Show what MODEL stores: every quantized linear with its settings and true bits per weight, and all that is kept as it was.

    Only headers are read. Settings: v4 k256+16 means vectors of 4 weights, 256 centroids, 16 residual centroids; 3 bit g128 a
    grid of 3 bits in groups of 128 columns; perm and norm a stored permutation, and column scales and shifts.

    [bold]Examples[/]

      voroq inspect out

      voroq inspect out --json | jq '.sites[] | select(.bits_per_weight > 3) | .name'
    """
    from voroq.pipeline.source import open_source
    from voroq.report.inspect import inspect_folder, inspection_view

    found = inspect_folder(open_source(model, revision=revision).folder)
    emit(asdict(found), as_json, *(() if as_json else (inspection_view(found),)))
