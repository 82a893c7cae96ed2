"""The listener that draws: a bar on a terminal, plain lines anywhere else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from voroq.cli.console import duration


class Clock:
    """Counts finished sites and guesses when the rest will be done: all time so far, shared by what is done, times what is left."""

    def __init__(self) -> None:
        self.started, self.done, self.total = time.monotonic(), 0, 0

    def eta(self) -> str:
        if not self.done:
            return "?"
        return duration((time.monotonic() - self.started) / self.done * (self.total - self.done))


class BarProgress:
    """Block, stage, last site with its loss, share done and time left, on one line of a terminal that keeps redrawing."""

    def __init__(self, console: Console):
        self.clock, self.blocks = Clock(), 0
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[block]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("", total=None, block="", eta="?")

    def start(self, blocks: int, sites: int) -> None:
        self.blocks, self.clock.total = blocks, sites
        self.bar.update(self.task, total=sites)
        self.bar.start()

    def block(self, i: int, name: str) -> None:
        self.bar.update(self.task, block=f"block {i + 1}/{self.blocks}", description=name)

    def stage(self, text: str) -> None:
        self.bar.update(self.task, description=text)

    def site(self, name: str, seconds: float, loss: float) -> None:
        self.clock.done += 1
        self.bar.update(self.task, advance=1, description=f"{name}  loss {loss:.4f}  {seconds:.1f} s", eta=self.clock.eta())

    def warn(self, text: str) -> None:
        self.bar.console.print(f"warning: {text}", markup=False, highlight=False)

    def done(self) -> None:
        self.bar.stop()


class LineProgress:
    """One line per event: for files, pipes and continuous integration."""

    def __init__(self, console: Console):
        self.console, self.clock, self.blocks, self.where = console, Clock(), 0, ""

    def start(self, blocks: int, sites: int) -> None:
        self.blocks, self.clock.total = blocks, sites
        self._say(f"{sites} sites in {blocks} blocks")

    def block(self, i: int, name: str) -> None:
        self.where = f"block {i + 1}/{self.blocks}"
        self._say(f"{self.where}  {name}")

    def stage(self, text: str) -> None:
        self._say(f"{self.where}  {text}".strip())

    def site(self, name: str, seconds: float, loss: float) -> None:
        self.clock.done += 1
        self._say(f"{self.where}  {name}  loss {loss:.4f}  {seconds:.1f} s  ETA {self.clock.eta()}")

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def done(self) -> None:
        self._say(f"all sites done after {duration(time.monotonic() - self.clock.started)}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


@contextmanager
def terminal_progress(console: Console) -> Iterator[BarProgress | LineProgress]:
    """The listener that suits where `console` writes to; however the block ends, the terminal is left as it was."""
    if not console.is_terminal:
        yield LineProgress(console)
        return
    listener = BarProgress(console)
    try:
        yield listener
    finally:
        listener.done()
