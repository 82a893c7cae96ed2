"""The tokens a run calibrates on: a seeded choice of windows from a text that is not used to measure.

Evaluation texts are refused, by name and by content: a quantized model calibrated on the text it is then measured on looks
better than it is.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from voroq.errors import VoroqError
from voroq.pipeline.progress import Progress, Silent
from voroq.pipeline.text import CALIBRATION_TEXTS, Tokenizer, bundled, cut_windows, evaluation_name, is_evaluation_text, read_text, tokenize

DEFAULT_SAMPLES = 512
Texts = str | Path | Sequence[str | Path] | None
"""A calibration text, several, or None for the bundled mixed text."""
# Characters a token is credited with when reading from a dataset without end; English is near 4, so the choice stays a choice.
DATASET_CHARACTERS_PER_TOKEN = 16


class Calibration(NamedTuple):
    """The chosen windows and the SHA-256 of their tokens, by which a resumed run knows that it continues with the same data."""

    windows: Int[Tensor, "windows ctx"]
    fingerprint: str


def calibration_windows(
    tokenizer: Tokenizer,
    source: Texts,
    *,
    samples: int = DEFAULT_SAMPLES,
    context: int,
    seed: int,
    progress: Progress | None = None,
) -> Calibration:
    """`samples` windows of `context` tokens, drawn by `seed` among the non-overlapping windows of `source`, in the order drawn: the first
    of them, which is what gradients are taken on, are of all of the text, and of all texts where there are several.

    `source`: None (the bundled mixed text), a bundled name, a .txt / .jsonl / .json file, or "dataset:NAME[:CONFIG[:SPLIT]]"; of
    several the windows are drawn from all together.

    A text with fewer windows gives all it has, with a warning. Raises VoroqError for evaluation texts, for what cannot be
    read and for a text shorter than one window.
    """
    if samples < 1 or context < 1:
        raise VoroqError(f"{samples} windows of {context} tokens cannot calibrate: both must be 1 or more")
    texts = [calibration_text(one, characters=samples * context * DATASET_CHARACTERS_PER_TOKEN) for one in listed(source)]
    windows = torch.cat([cut_windows(tokenize(tokenizer, text), context, name) for name, text in texts])
    if windows.shape[0] < samples:
        text = f"{described(source)} has {windows.shape[0]} windows of {context} tokens, not {samples}: calibrating on all of them"
        (progress or Silent()).warn(text)
    chosen = windows[torch.randperm(windows.shape[0], generator=torch.Generator().manual_seed(seed))[:samples]]
    return Calibration(chosen, hashlib.sha256(chosen.numpy().tobytes() + str(tuple(chosen.shape)).encode()).hexdigest())


def described(source: Texts) -> str:
    """The names of a calibration's texts, for people; of a file its own, since where it lies is nobody's business."""
    names = (CALIBRATION_TEXTS[0] if one is None else one for one in listed(source))
    return " + ".join(Path(name).name if Path(name).is_file() else str(name) for name in names)


def listed(source: Texts) -> list[str | Path | None]:
    """The texts of `source` one by one, None for the bundled one."""
    if source is None or isinstance(source, str | Path):
        return [source]
    if not source:
        raise VoroqError("no calibration text is given; leave it out for the bundled one, or give at least one")
    return list(source)


def calibration_text(source: str | Path | None, *, characters: int) -> tuple[str, str]:
    """Name and content of a calibration source; from a dataset at most about `characters` are taken."""
    name = CALIBRATION_TEXTS[0] if source is None else str(source)
    if name.startswith("dataset:"):
        text = _dataset(name.removeprefix("dataset:"), characters)
    elif name in CALIBRATION_TEXTS:
        return name, bundled(name).read_text(encoding="utf-8")
    elif evaluation_name(name) and not Path(name).is_file():
        raise _refusal(name, name)
    else:
        if not Path(name).is_file():
            known = ", ".join(CALIBRATION_TEXTS)
            raise VoroqError(f"no calibration text {name}: give a .txt/.jsonl/.json file, {known}, or dataset:NAME")
        text = read_text(Path(name))
    measured = is_evaluation_text(text)
    if measured:
        raise _refusal(name, measured)
    return name, text


def _refusal(given: str, text: str) -> VoroqError:
    return VoroqError(
        f"{given} is the evaluation text {text}, which may not calibrate (measurements on it would lie): "
        f"use {' or '.join(CALIBRATION_TEXTS)}, or a text of your own"
    )


def _dataset(name: str, characters: int) -> str:
    """Text of the "text" column of a dataset of the hub (or a local one), read as a stream until there is enough."""
    try:
        import datasets
    except ImportError as error:
        raise VoroqError(f"dataset:{name} needs the package datasets: pip install datasets, or give a text file") from error
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
        text = _enough((row.get("text") for row in rows), characters)
    except Exception as error:  # the package raises whatever its back ends raise; each means "this name gives no rows"
        reason = " ".join(str(error).split())[:200]
        raise VoroqError(
            f"dataset {name} cannot be read ({type(error).__name__}: {reason}): check its name, or give a text file"
        ) from error
    if not text.strip():
        raise VoroqError(f'dataset {name} gave no text: it needs a column "text"')
    return text


def _enough(texts: Iterable[object], characters: int) -> str:
    """Join documents until `characters` are reached (never more than a million documents)."""
    parts, size = [], 0
    for text in islice(texts, 1_000_000):
        if isinstance(text, str) and text.strip():
            parts.append(text)
            size += len(text)
        if size >= characters:
            break
    return "\n\n".join(parts)
