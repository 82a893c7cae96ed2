"""Many damaged folders: how many are refused in words, how many still load, how many fail (the goal: none).

Cases run in order in one child process per thousand, so that a crash of the interpreter is seen and counted. The judge and the damage
are `tests/hostile.py`; case N is the same on every machine.

    python benchmarks/fuzz.py --cases 20000 --json benchmarks/results/fuzz.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import arguments, publish

CHUNK = 1000
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--chunk", type=int, nargs=2, metavar=("FIRST", "STOP"), help="run these in this process and print JSON")
    args = parser.parse_args()
    if args.chunk:
        sys.stdout.write(json.dumps(chunk(*args.chunk)) + "\n")
        return
    cases, began = 200 if args.quick else args.cases, time.perf_counter()
    kinds: Counter[str] = Counter()
    damage: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    for first in range(args.first, args.first + cases, CHUNK):
        stop = min(first + CHUNK, args.first + cases)
        for row in in_child(first, stop):
            kinds[row["kind"]] += 1
            for name in row["damage"].split("+"):
                damage.setdefault(name, Counter())[row["kind"]] += 1
            if row["kind"] == "failed":
                failures.append(row)
        sys.stderr.write(f"{stop - args.first} of {cases}: {dict(kinds)}\n")
    rows = [{"damage": name, **{kind: counts[kind] for kind in ("refused", "loaded", "failed")}} for name, counts in sorted(damage.items())]
    seconds = time.perf_counter() - began
    publish(f"{cases} damaged folders (several kinds of damage in some)", rows, args, first=args.first, cases=cases, kinds=dict(kinds),
            failures=failures[:50], seconds=seconds)  # fmt: skip
    sys.exit(1 if failures else 0)


def in_child(first: int, stop: int) -> list[dict[str, Any]]:
    """The outcomes of cases first..stop; a crash of the child is the failure of the case that it was at."""
    command = [sys.executable, "-X", "faulthandler", __file__, "--chunk", str(first), str(stop)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if stop - first == 1:
        return [{"case": first, "kind": "failed", "damage": "crash", "message": f"exit {done.returncode}: {done.stderr[-500:]}"}]
    middle = (first + stop) // 2
    return in_child(first, middle) + in_child(middle, stop)


def chunk(first: int, stop: int) -> list[dict[str, Any]]:
    import hostile

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        bases = hostile.bases(Path(folder))
        rows = []
        for case in range(first, stop):
            found = hostile.outcome(bases[case % len(bases)], case, work)
            rows.append({"case": case, "kind": found.kind, "damage": found.damage, "message": found.message[:400]})
    return rows


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
