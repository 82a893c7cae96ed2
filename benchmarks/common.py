"""What every benchmark shares: its arguments, its table, its results file."""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="a small version, to see that it runs")
    return parser


def machine() -> dict[str, Any]:
    """Where and on what this ran; the numbers mean nothing without it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {"cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
            "commit": commit.stdout.strip()}  # fmt: skip


def in_turns(works: dict[Any, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[Any, float]:
    """Least seconds of each of `works` by `clock`, done in turns: whatever else runs on the machine hits all of them."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up, and counts if it is the fastest
        for name, work in works.items():
            begun = clock()
            work()
            best[name] = min(best[name], clock() - begun)
    return best


def publish(title: str, rows: list[dict[str, Any]], args: argparse.Namespace, **more: Any) -> None:
    """Print `rows` as a table and write them, with the machine, to --json."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*[f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value) for value in row.values()])
    Console(width=150).print(table)
    if args.json:
        args.json.write_text(json.dumps({"title": title, "machine": machine(), "quick": args.quick, **more, "rows": rows}, indent=2) + "\n")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
