"""What a run's report says of its methods and of all its sites together."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from voroq.methods import Method
from voroq.pipeline.memory import peak_memory
from voroq.pipeline.source import Source
from voroq.pipeline.work import describe


def described(methods: Sequence[Method]) -> dict[str, Any]:
    """Name and options of the sites' methods; options are {} where there are none or they differ, each site's row has its own."""
    names = sorted({getattr(method, "__name__", type(method).__name__) for method in methods})
    uniform = len(set(map(describe, methods))) == 1 and dataclasses.is_dataclass(methods[0])
    options = {field.name: getattr(methods[0], field.name) for field in dataclasses.fields(methods[0])} if uniform else {}
    plain = {name: value if isinstance(value, bool | int | float | str | None) else repr(value) for name, value in options.items()}
    return {"method": ", ".join(names).lower(), "options": plain}


def totals(origin: Source, entries: list[dict[str, Any]], began: float) -> dict[str, Any]:
    """What all sites came to; `began` is when this process did (time.perf_counter)."""
    rows = [row for entry in entries for row in entry["sites"]]
    weights = sum(math.prod(row["shape"]) for row in rows)
    kept = [name for entry in entries for name in entry["verbatim"]]
    return {
        "bits_per_weight": sum(row["bits_per_weight"] * math.prod(row["shape"]) for row in rows) / weights,
        "seconds": max(time.perf_counter() - began, sum(entry["seconds"] for entry in entries)),
        "peak_memory": peak_memory(),
        "block_tuning": [entry["tuned"] for entry in entries if entry.get("tuned")] or None,
        "sites": rows,
        "unquantized": [{"name": name, "shape": list(origin.tensors[name].shape)} for name in kept],
        "shards": {entry["file"]: entry["sha256"] for entry in entries},
        "tensors": {name: checksum for entry in entries for name, checksum in entry.get("crc32", {}).items()},
    }
