"""The application: its commands, and how everything that goes wrong ends (one line on stderr and an exit code)."""

import inspect
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from voroq.cli import bench, chat, convert, demo, doctor, evaluate, inspection, methods, plan, prune, quantize, rotate, write
from voroq.cli.console import error_line
from voroq.errors import VoroqError

USAGE, INTERRUPTED = 2, 130
# The base of all of typer's complaints about flags; typer names only this descendant in public.
UsageProblem = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="voroq",
    help="Extremely low-bit quantization of large language models by vectors.",
    epilog="Start with: voroq demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def help_text(function: Callable[..., None]) -> str:
    """The docstring with each paragraph on one line, for the terminal to wrap; indented lines (examples) stay lines."""
    paragraphs = inspect.getdoc(function).split("\n\n")
    return "\n\n".join(text if text.startswith(" ") else text.replace("\n", " ") for text in paragraphs)


for name, function in {
    "quantize": quantize.quantize,
    "plan": plan.plan,
    "rotate": rotate.rotate,
    "prune": prune.prune,
    "write": write.write,
    "eval": evaluate.evaluate,
    "bench": bench.bench,
    "inspect": inspection.inspect,
    "convert": convert.convert,
    "verify": convert.verify,
    "generate": chat.generate,
    "chat": chat.chat,
    "methods": methods.methods,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}.items():
    app.command(name, help=help_text(function))(function)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"voroq {version('voroq')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = None,
) -> None:
    """Extremely low-bit quantization of large language models by vectors."""


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 defects found, 2 bad input (one line says what and why), 130 interrupted.

    Bugs keep their traceback.
    """
    # Waiting threads spin for some microseconds and then sleep: with anything else on the cores, spinning makes torch ten times slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = app(arguments, prog_name="voroq", standalone_mode=False)
    except VoroqError as error:
        error_line(str(error))
        code = USAGE
    except UsageProblem as error:
        # calling without arguments prints the help, which is itself the exception's text
        if type(error).__name__ != "NoArgsIsHelpError":
            error_line(f"{error.format_message()} (see voroq {arguments[0] if len(arguments) > 1 else ''} --help)")
        code = USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # newer typer turns the interrupt into this code itself
        resume = "; the same command with --resume continues" if arguments[:1] == ["quantize"] else ""
        error_line(f"interrupted{resume}")
    sys.exit(code or 0)
