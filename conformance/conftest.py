"""`make conformance`: the official package in an environment of its own (VOROQ_OFFICIAL names its python), asked through files."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

HERE = Path(__file__).parent
OFFICIAL = os.environ.get("VOROQ_OFFICIAL", str(HERE.parent / ".venv-conformance" / "bin" / "python"))
FOUND: list[str] = []


def ask(*arguments: str | Path) -> str:
    """Run the official side; its stdout."""
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [OFFICIAL, str(HERE / "official.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=keep)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def found():
    """Add a line to the results."""
    return FOUND.append


def pytest_sessionfinish(session):
    """Versions, date, what was measured and how the tests ended, in results.txt if VOROQ_RESULTS names it."""
    path = os.environ.get("VOROQ_RESULTS")
    if not path:
        return
    official = json.loads(ask("versions"))
    ours = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    failed = session.testsfailed
    lines = [
        f"{datetime.date.today().isoformat()}   make conformance   {session.testscollected - failed} passed, {failed} failed",
        "official side: " + ", ".join(f"{name} {version}" for name, version in official.items()) + " (pure torch path, CPU)",
        "our side:      " + ", ".join(f"{name} {version}" for name, version in ours.items()),
        "",
        *FOUND,
    ]
    Path(path).write_text("\n".join(lines) + "\n")
