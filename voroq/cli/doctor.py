"""`voroq doctor`: what this installation can do."""

from dataclasses import asdict

import typer

from voroq.cli import options
from voroq.cli.console import emit


def doctor(as_json: options.Json = False) -> None:
    """Show versions, devices and the kernels found, and test every kernel against the reference; what is missing, and how to get it.

    Exits with 1 if a kernel computes something wrong here. VOROQ_KERNEL=reference turns all others off.

    [bold]Examples[/]

      voroq doctor

      voroq doctor --json | jq .cpu_problem
    """
    from voroq.report.doctor import diagnose, diagnosis_view

    found = diagnose()
    emit(asdict(found), as_json, diagnosis_view(found))
    if not found.healthy:
        raise typer.Exit(1)
