"""What a run says: lines where nobody watches, a bar on a terminal."""

import io

from rich.console import Console

from voroq.cli import progress
from voroq.cli.console import duration, error_line, size
from voroq.cli.progress import BarProgress, Clock, LineProgress, terminal_progress
from voroq.pipeline.progress import Progress


def tell(listener: Progress) -> None:
    listener.warn("before [the] start")
    listener.start(3, 6)
    listener.block(1, "model.layers.1")
    listener.stage("observing")
    listener.site("model.layers.1.mlp.up_proj", 1.25, 0.03)
    listener.done()


def test_lines_carry_block_site_loss_and_time_left():
    out = io.StringIO()
    with terminal_progress(Console(file=out, width=40)) as listener:
        assert isinstance(listener, LineProgress)
        assert isinstance(listener, Progress)
        tell(listener)
    lines = out.getvalue().splitlines()
    assert lines[0] == "warning: before [the] start"
    assert lines[1] == "6 sites in 3 blocks"
    assert lines[3] == "block 2/3  observing"
    assert lines[4].startswith("block 2/3  model.layers.1.mlp.up_proj  loss 0.0300  1.2 s  ETA ")
    assert len(lines) == 6


def test_a_terminal_gets_a_bar_that_is_gone_afterwards():
    out = io.StringIO()
    with terminal_progress(Console(file=out, width=120, force_terminal=True)) as listener:
        assert isinstance(listener, BarProgress)
        assert isinstance(listener, Progress)
        tell(listener)
    text = out.getvalue()
    assert "before [the] start" in text
    assert "block 2/3" in text
    assert "loss 0.0300" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_time_left_is_the_mean_time_of_a_site_times_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = Clock()
    clock.total = 10
    assert clock.eta() == "?"
    clock.done, now[0] = 4, 120.0
    assert clock.eta() == "30 s"


def test_sizes_and_durations_for_people():
    assert [size(n) for n in (999, 22_033_728, 3.2e12)] == ["999 B", "22.0 MB", "3.2 TB"]
    assert [duration(s) for s in (4.4, 185, 7800)] == ["4 s", "3 min 05 s", "2 h 10 min"]


def test_an_error_is_one_line(capsys):
    error_line("a\n  b")
    assert capsys.readouterr().err == "error: a b\n"
