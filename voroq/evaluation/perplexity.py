"""Perplexity of a causal model, and how far it has moved from another one.

For windows t_1..t_C of the text, every window on its own:

    perplexity = exp(-mean log q(t_{i+1} | t_1..t_i))          kl = mean_i sum_v p_i(v) (log p_i(v) - log q_i(v))

with q the model, p the original, i = 1..C-1, the natural logarithm and log-softmax in float32 (sums over positions in float64).
KL to the original sees changes that perplexity averages away, and is the more trusted number at low bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from voroq.errors import VoroqError

# Logits held at once by a forward, and float32 values per step of the log-softmax: the peak beside the model itself.
LOGITS_AT_ONCE = 1 << 24
SOFTMAX_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Evaluation:
    """`tokens` predictions in windows of `context`. Only with an original: `kl` in nats per token, `top1` (the share of equal best
    tokens), and the original's own perplexity on the same predictions."""

    perplexity: float
    perplexity_against: float | None
    kl: float | None
    top1: float | None
    tokens: int
    context: int


def evaluate(
    model: nn.Module,
    tokens: Int[Tensor, "windows ctx"],
    *,
    against: nn.Module | None = None,
    batch: int | None = None,
    through: Callable[[nn.Module, Tensor], Tensor] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure `model` on the windows `tokens`, every one from its own start; `against` is the original model.

    `batch` windows go through the model together (None: as many as keep the logits small), by `through(model, rows)` if given (see
    `evaluation/cached.py`; the original takes the plain way); `tick(n)` is called after every n
    windows. Raises VoroqError for tokens outside the vocabulary, differing vocabularies, and logits that are not finite.
    """
    windows, context = tokens.shape
    if context < 2 or windows < 1:
        raise VoroqError(f"{windows} windows of {context} tokens leave nothing to predict: give 1 or more windows of 2 or more tokens")
    models = [model] if against is None else [model, against]
    vocabulary = min(_vocabulary(m) for m in models)
    if tokens.max() >= vocabulary:
        raise VoroqError(f"token {int(tokens.max())} is not in the model's vocabulary of {vocabulary}: give the tokenizer of this model")
    step = batch or max(1, LOGITS_AT_ONCE // (vocabulary * context))
    sums = torch.zeros(4, dtype=torch.float64)
    training = [m.training for m in models]
    try:
        for m in models:
            m.eval()
        with torch.inference_mode():
            for rows in tokens.split(step):
                logits, original = (through or _logits)(model, rows), None if against is None else _logits(against, rows)
                for i, row in enumerate(rows):
                    sums += _measure(logits[i], None if original is None else original[i], row)
                if tick is not None:
                    tick(rows.shape[0])
    finally:
        for m, mode in zip(models, training, strict=True):
            m.train(mode)
    return _summary(sums, windows * (context - 1), context, compared=against is not None)


def pooled(evaluations: list[Evaluation]) -> Evaluation:
    """All predictions of several evaluations together, as if their windows had been one text."""
    count = sum(e.tokens for e in evaluations)
    compared = all(e.kl is not None for e in evaluations)
    sums = torch.zeros(4, dtype=torch.float64)
    for e in evaluations:
        logs = [math.log(e.perplexity), math.log(e.perplexity_against or 1.0)]
        sums += e.tokens * torch.tensor([*logs, e.kl or 0.0, e.top1 or 0.0], dtype=torch.float64)
    return _summary(sums, count, evaluations[0].context, compared=compared)


def _summary(sums: Float[Tensor, "four"], count: int, context: int, *, compared: bool) -> Evaluation:
    """The evaluation with these sums (see `_measure`) over `count` predictions."""
    loss, loss_against, kl, same = (float(s) / count for s in sums)
    if not all(math.isfinite(value) for value in (loss, loss_against, kl)):
        raise VoroqError("the logits are not finite: the weights are damaged, or the dtype is too narrow (try --dtype float32)")
    if not compared:
        return Evaluation(_perplexity(loss), None, None, None, count, context)
    return Evaluation(_perplexity(loss), _perplexity(loss_against), kl, same, count, context)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that no float64 holds it


def _vocabulary(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _logits(model: nn.Module, rows: Int[Tensor, "w ctx"]) -> Float[Tensor, "w ctx v"]:
    return model(input_ids=rows.to(model.device), use_cache=False).logits


def _measure(logits: Float[Tensor, "ctx v"], original: Float[Tensor, "ctx u"] | None, row: Int[Tensor, "ctx"]) -> Float[Tensor, "four"]:
    """Sums over one window, in chunks of positions: the model's negative log-likelihood, the original's, KL, equal best tokens."""
    if original is not None and original.shape != logits.shape:
        raise VoroqError(
            f"vocabularies of {logits.shape[-1]} and {original.shape[-1]} tokens cannot be compared: give the model's original"
        )
    targets = row[1:, None].to(logits.device)
    chunk = max(1, SOFTMAX_AT_ONCE // logits.shape[1])
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, targets.shape[0], chunk):
        span = slice(start, min(start + chunk, targets.shape[0]))
        log_q = logits[span].float().log_softmax(1)
        sums[0] -= log_q.gather(1, targets[span]).double().sum().cpu()
        if original is not None:
            log_p = original[span].to(log_q.device).float().log_softmax(1)
            sums[1] -= log_p.gather(1, targets[span]).double().sum().cpu()
            # a token of probability 0 under p adds nothing, whatever q says: the limit of p log p
            difference = torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p - log_q)
            sums[2] += (log_p.exp() * difference).sum(1).double().sum().cpu()
            sums[3] += (log_p.argmax(1) == log_q.argmax(1)).sum().cpu()
    return sums
