"""One model on several texts, with or without its original beside it: what `voroq eval` and `voroq demo` report."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.evaluation.models import context_of, max_positions, open_model
from voroq.evaluation.perplexity import evaluate, pooled
from voroq.evaluation.texts import evaluation_windows


@dataclass(frozen=True)
class TextResult:
    """One text's numbers (see `Evaluation`)."""

    text: str
    perplexity: float
    perplexity_against: float | None
    kl: float | None
    top1: float | None
    tokens: int
    context: int


@dataclass(frozen=True)
class Comparison:
    """All texts together, and each."""

    model: str
    against: str | None
    perplexity: float
    perplexity_against: float | None
    kl: float | None
    top1: float | None
    tokens: int
    context: int
    texts: list[TextResult]


def compare(
    model: str | Path,
    texts: list[str],
    *,
    against: str | Path | None = None,
    context: int | None = None,
    windows: int | None = None,
    batch: int | None = None,
    opening: dict[str, Any] | None = None,
    change: Callable[[nn.Module], None] | None = None,
    through: Callable[[nn.Module, Tensor], Tensor] | None = None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Open the models (`opening`: device, dtype, revision, trust_remote_code of `open_model`) and evaluate on every text.

    `change` may alter the model once it is loaded, `through` is the way through it (not the original; see `evaluate`).
    `tick(text, windows, total)` is called as windows are finished. Raises VoroqError as the parts do, and for a context beyond
    the model's positions.
    """
    opening = opening or {}
    subject, tokenizer = open_model(model, **opening)
    if change is not None:
        change(subject)
    length = context or context_of(subject)
    limit = max_positions(subject)
    if limit is not None and length > limit:
        raise VoroqError(f"a context of {length} tokens exceeds the model's {limit} positions: give --context {limit} or less")
    chosen = {name: evaluation_windows(tokenizer, name, context=length, windows=windows) for name in texts}
    # a revision names a commit of the model that is measured, not of the other one
    original = None if against is None else open_model(against, **{**opening, "revision": None})[0]
    found = []
    for name, tokens in chosen.items():
        total = tokens.shape[0]
        report = None if tick is None else lambda count, name=name, total=total: tick(name, count, total)
        found.append(evaluate(subject, tokens, against=original, batch=batch, through=through, tick=report))
    every = pooled(found)
    return Comparison(
        model=str(model),
        against=None if against is None else str(against),
        perplexity=every.perplexity,
        perplexity_against=every.perplexity_against,
        kl=every.kl,
        top1=every.top1,
        tokens=every.tokens,
        context=length,
        texts=[TextResult(name, **asdict(e)) for name, e in zip(chosen, found, strict=True)],
    )
