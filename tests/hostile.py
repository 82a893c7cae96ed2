"""Damaged and malicious model folders, made from tiny good ones; a case is a number, and the same number is the same damage.

    outcome(base, case, folder) -> Outcome        "refused" with a one-line message, or "loaded", or "failed" with the reason

A case fails unless the loader either raises FormatError or VoroqError in one line that names a file, tensor or field, or gives a model
that computes. Each case has a few seconds and a few hundred MB of address space more than the process had; a case that wants more
fails. Not mutated: the tokenizer, whose reader is another library.
"""

import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from damage import CONFIG, INDEX, MUTATIONS, WEIGHTS, Files, joined, split

import voroq
from voroq.errors import FormatError, VoroqError
from voroq.integrations.conftest import make_first, make_old, write_gptqmodel, write_model
from voroq.integrations.shapes import open_model_folder
from voroq.packed.conftest import random_pvq

SECONDS, MEMORY = 20, 512 << 20
"""Limits of one case, beyond which it hangs or takes what no file of some kilobytes can ask for."""
WAITING = 10
"""Times that in which it may wait for a processor that others use."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    damage: str
    message: str


def _old(path: Path, **options: bool) -> None:
    make_old(path, write_model(path, "llama", "vptq"), **options)


BASES: dict[str, Callable[[Path], Any]] = {
    "vptq": lambda path: write_model(path, "llama", "vptq"),
    "vptq with biases": lambda path: write_model(path, "qwen2", "vptq"),
    "grids": lambda path: write_model(path, "llama", "voroq"),
    "grids of experts": lambda path: write_model(path, "mixtral", "voroq"),
    "pyramids, rotations and tables": lambda path: write_model(path, "llama", "voroq", linear=random_pvq),
    "unpacked": _old,
    "unpacked as floats": lambda path: _old(path, floats=True),
    "packed with floats": lambda path: _old(path, unpacked=False, floats=True),
    "first releases": lambda path: make_first(path, write_model(path, "llama", "vptq")),
    "GPTQModel": write_gptqmodel,
}


def bases(folder: Path) -> list[Files]:
    """Small good folders in every layout that is read, and the first two once more in shards, and with a shared entry."""
    made = []
    for number, write in enumerate(BASES.values()):
        path = folder / str(number)
        write(path)
        made.append({file.name: file.read_bytes() for file in path.iterdir() if file.is_file()})
    return [*made, _sharded(made[0]), _shared(made[1])]


def outcome(base: Files, case: int, folder: Path) -> Outcome:
    """What the loader makes of damage number `case` to `base`, written to `folder`."""
    rng = random.Random(case)
    files, done = dict(base), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name, mutate = rng.choice(MUTATIONS)
        mutate(files, rng)
        done.append(name)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    damage = "+".join(done)
    try:
        with _limits():
            _use(folder, forward="model config" not in done)
    except (FormatError, VoroqError) as error:
        wrong = _complaint(error)
        return Outcome("failed", damage, wrong) if wrong else Outcome("refused", damage, str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome("failed", damage, f"{type(error).__name__}: {error}")
    return Outcome("loaded", damage, "")


def _use(folder: Path, *, forward: bool) -> None:
    try:
        opened = open_model_folder(folder)
        for name in opened.sites():
            opened.packed(name)
    except (FormatError, VoroqError) as refusal:
        with _refused(refusal):
            voroq.load(folder, device="cpu")
    model, _ = voroq.load(folder, device="cpu")
    if forward:
        with torch.no_grad():
            model(torch.arange(3, 9)[None])


@contextmanager
def _refused(refusal: VoroqError) -> Iterator[None]:
    """What `open_model_folder` refuses, the front door must refuse too, and in the same manner."""
    try:
        yield
    except VoroqError as error:
        if _complaint(error):
            raise
        raise refusal from refusal.__cause__
    raise AssertionError(f"voroq.load took what open_model_folder refused: {refusal}")


def _complaint(error: Exception) -> str:
    """What is wrong with a refusal: not one line, nothing named, or a crash of ours in disguise."""
    text = str(error)
    if "\n" in text or len(text) > 1200:
        return f"not one short line: {text[:300]}"
    cause = error.__cause__
    if isinstance(cause, MemoryError | Hung) or (cause is not None and "allocate" in str(cause)):
        return f"memory or time: {cause!r:.200}"
    trace = cause.__traceback__ if cause is not None and not isinstance(cause, OSError | VoroqError) else None
    while trace is not None:
        place = trace.tb_frame.f_code.co_filename
        expected = "Safetensor" in type(cause).__name__ or isinstance(cause, json.JSONDecodeError | UnicodeDecodeError)
        ours = any(part in place for part in ("/voroq/layer", "/voroq/kernels/", "/voroq/integrations/transformers"))
        if ours and not expected:
            return f"{type(cause).__name__} inside {place.rsplit('/voroq/', 1)[-1]}: {cause}"
        trace = trace.tb_next
    named = ("tensor ", "config", ".safetensors", ".json", "quantiz", "cannot be loaded: ", "no tokenizer that transformers can read: ")
    return "" if any(word in text for word in named) else f"names nothing: {text}"


class Hung(BaseException):
    pass


@contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung(f"took more than {SECONDS} seconds of computing, or {WAITING * SECONDS} in all")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITING * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def _sharded(files: Files) -> Files:
    """The same model in two shards with an index."""
    table, payload = split(files[WEIGHTS])
    names = [name for name in table if name != "__metadata__"]
    out = {name: data for name, data in files.items() if name != WEIGHTS}
    weights = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard, body = f"model-0000{number}-of-00002.safetensors", b""
        made: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in part:
            data = payload[slice(*table[name]["data_offsets"])]
            made[name] = table[name] | {"data_offsets": [len(body), len(body) + len(data)]}
            body += data
            weights[name] = shard
        out[shard] = joined(made, body)
    return out | {INDEX: json.dumps({"metadata": {}, "weight_map": weights}).encode()}


def _shared(files: Files) -> Files:
    """The same model with one entry for the key projections of all blocks, where their settings agree."""
    config = json.loads(files[CONFIG])
    layers = config["quantization_config"]["config_for_layers"]
    first = next(name for name in layers if name.endswith("k_proj"))
    config["quantization_config"]["shared_layer_config"] = {"k_proj": layers.pop(first)}
    return files | {CONFIG: json.dumps(config).encode()}
