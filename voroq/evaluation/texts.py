"""Texts to measure on: three bundled ones, or any file."""

from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from voroq.errors import VoroqError
from voroq.pipeline.text import EVALUATION_TEXTS, Tokenizer, bundled, cut_windows, evaluation_name, read_text, tokenize


def evaluation_text(name: str | Path) -> str:
    """The text called `name`: wikitext2, books, c4, or a .txt / .jsonl / .json file."""
    if Path(name).is_file():
        return read_text(Path(name))
    known = evaluation_name(str(name))
    if known is None:
        raise VoroqError(f"no text {name}: give a .txt/.jsonl/.json file or one of {', '.join(EVALUATION_TEXTS)}")
    return bundled(EVALUATION_TEXTS[known]).read_text(encoding="utf-8")


def evaluation_windows(tokenizer: Tokenizer, name: str | Path, *, context: int, windows: int | None = None) -> Int[Tensor, "windows ctx"]:
    """The first `windows` (None: all) non-overlapping windows of the text, tokenised without special tokens.

    Raises VoroqError if the text has no whole window, or fewer than asked for.
    """
    if context < 2:
        raise VoroqError(f"a context of {context} leaves nothing to predict: give 2 or more")
    if windows is not None and windows < 1:
        raise VoroqError(f"{windows} windows leave nothing to measure: give 1 or more")
    found = cut_windows(tokenize(tokenizer, evaluation_text(name)), context, str(name))
    if windows is None:
        return found
    if found.shape[0] < windows:
        raise VoroqError(f"{name} has {found.shape[0]} windows of {context} tokens, not {windows}: give fewer --windows or a longer text")
    return found[:windows]
