"""What a run tells the outside world while it works.

The pipeline knows nothing of terminals: it calls these six verbs, and whoever started the run decides what becomes of
them (the command line draws a bar, a notebook may collect them, the default is silence).
"""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Listener of one run. Calls come in the order start, (block, stage*, site*)*, done; `warn` and `stage` may come at any time."""

    def start(self, blocks: int, sites: int) -> None:
        """The model has `blocks` blocks; `sites` sites in them are still to do (a resumed run has fewer)."""

    def block(self, i: int, name: str) -> None:
        """Block `i` (counted from 0), called `name` in the model, begins."""

    def stage(self, text: str) -> None:
        """A step inside a block or before the first one ("observing", "writing")."""

    def site(self, name: str, seconds: float, loss: float) -> None:
        """One site is done: `loss` is its relative proxy loss tr(E H E^T) / tr(W H W^T)."""

    def warn(self, text: str) -> None:
        """Something a user should know although the run goes on; one line."""

    def done(self) -> None:
        """Nothing follows."""


class Silent:
    """The listener that does nothing."""

    def start(self, blocks: int, sites: int) -> None:
        pass

    def block(self, i: int, name: str) -> None:
        pass

    def stage(self, text: str) -> None:
        pass

    def site(self, name: str, seconds: float, loss: float) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def done(self) -> None:
        pass
