"""Text in, windows of tokens out: the one place that reads text files and knows which texts are bundled.

A text is one long string. It is tokenised without special tokens and cut into non-overlapping windows from its start, for
calibration and for evaluation alike, so that a window means the same thing everywhere.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from voroq.errors import VoroqError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEMO_MODEL = ASSETS / "demo-llama"

CALIBRATION_TEXTS = ("calibration-mixed", "calibration-c4")
# Short names of the texts that measure and therefore may never calibrate.
EVALUATION_TEXTS = {"wikitext2": "wikitext2-test", "books": "books-heldout", "c4": "c4-heldout"}

Tokenizer = Callable[..., object]


def bundled(name: str) -> Path:
    """The file of the bundled text `name` (without its ending)."""
    return ASSETS / "text" / f"{name}.txt"


def evaluation_name(name: str) -> str | None:
    """The short name of the bundled evaluation text that `name` means ("c4", "c4-heldout"), or None."""
    names = {**{short: short for short in EVALUATION_TEXTS}, **{full: short for short, full in EVALUATION_TEXTS.items()}}
    return names.get(name)


def fingerprint_of(text: str) -> str:
    """SHA-256 of a text, blind to white space at its ends."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


def is_evaluation_text(text: str) -> str | None:
    """The short name of the bundled evaluation text with this very content, or None."""
    mark = fingerprint_of(text)
    for short, full in EVALUATION_TEXTS.items():
        if fingerprint_of(bundled(full).read_text(encoding="utf-8")) == mark:
            return short
    return None


def read_text(path: Path) -> str:
    """The text of a .jsonl or .json file (a "text" field per row, or plain strings) or of any other file as it is.

    Documents are joined by an empty line. Raises VoroqError for a missing, unreadable, empty or badly formed file.
    """
    if not path.is_file():
        raise VoroqError(f"no text at {path}: give a .txt, .jsonl or .json file, or one of the bundled names")
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise VoroqError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8") from error
    except OSError as error:
        raise VoroqError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".jsonl":
        rows = [_parse(line, f"{path} line {i}") for i, line in enumerate(raw.splitlines(), 1) if line.strip()]
        text = _documents(rows, path)
    elif path.suffix == ".json" and raw.strip():
        rows = _parse(raw, str(path))
        text = _documents(rows if isinstance(rows, list) else [rows], path)
    else:
        text = raw
    if not text.strip():
        raise VoroqError(f"{path} is empty: give a file with text in it")
    return text


def _parse(raw: str, where: str) -> object:
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise VoroqError(f"{where} is not JSON ({error.msg}): one JSON value a line for .jsonl, one value for .json") from error


def _documents(rows: list, path: Path) -> str:
    """Join rows that are strings or objects with a string under "text"."""
    texts = [row.get("text") if isinstance(row, dict) else row for row in rows]
    for i, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise VoroqError(f'{path} row {i} has no text: every row must be a string or an object with a string under "text"')
    return "\n\n".join(texts)


def tokenize(tokenizer: Tokenizer, text: str) -> Int[Tensor, "tok"]:
    """Token ids of `text` without special tokens."""
    # verbose=False: the text is meant to be longer than the model's context, no need to warn of it
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def cut_windows(tokens: Int[Tensor, "tok"], context: int, source: str) -> Int[Tensor, "windows ctx"]:
    """Every whole non-overlapping window of `context` tokens from the start; a remainder is left out.

    Raises VoroqError if there is not even one.
    """
    whole = tokens.shape[0] // context
    if whole == 0:
        raise VoroqError(
            f"{source} holds {tokens.shape[0]} tokens, shorter than one window of {context}: give a longer text or a smaller --context"
        )
    return tokens[: whole * context].reshape(whole, context)


def default_context(max_positions: int | None) -> int:
    """Window length used when none is asked for: what the model was made for, at most 2048."""
    return min(max_positions or 2048, 2048)
