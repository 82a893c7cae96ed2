"""What reaches the terminal: results on stdout (a table for people or one JSON value for machines), all else on stderr."""

import json
import os
import sys

from rich.console import Console, RenderableType

# Wide enough for the widest table where no terminal says how wide it is (files, pipes, CI).
PLAIN_WIDTH = 120


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False)


def out() -> Console:
    """Where results go."""
    return _console(stderr=False)


def err() -> Console:
    """Where progress, warnings and errors go."""
    return _console(stderr=True)


def emit(data: object, as_json: bool, *views: RenderableType) -> None:
    """Print `data` as JSON, or `views` one after another. Numbers that JSON cannot say (NaN, infinity) are an error, not a word."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    for view in views:
        out().print(view)


def error_line(text: str) -> None:
    """One line on stderr, whatever is in `text`."""
    sys.stderr.write("error: " + " ".join(text.split()) + "\n")


def size(count: int | float) -> str:
    """Bytes for people: 22.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: int | float) -> str:
    """Seconds for people: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
