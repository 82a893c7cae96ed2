"""Tuning as a loop on tensors: Adam with a warm-up and a cosine, moves of codes, and a choice by windows held out.

    minimise   mean over windows of  loss(windows)      over tables, scales, shifts and plain parameters

What the loss is, and of what model or block, is the caller's. The state that did best on the held-out windows is kept; if none
beat the first one nothing changes. Step sizes are relative to the size of each parameter, so they mean the same in every model.
`state` and `restore` carry the loop over an interruption: it ends with the same numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.quantized import Quantized, reals, with_reals
from voroq.tuning.moves import BETAS, Latent, repick
from voroq.tuning.trainable import Trainable

HELD_OUT = 32
"""Windows kept from training to choose by, at most an eighth of all."""
CHECK_EVERY = 30
"""Steps between looks at the held-out windows, at least; there are twenty looks at most."""
MOVE_EVERY = 4
"""Steps between moves of codes."""
_WARM_UP = 10
_ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What the optimiser remembers of a tensor, once it has moved."""


@dataclass(frozen=True)
class Tuning:
    """How long and how hard. Zero steps change nothing."""

    steps: int = 120
    """optimiser steps"""
    samples: int = 2048
    """windows of the calibration text to tune on; more than the moments need, since every step wants new ones"""
    batch: int = 8
    """windows per step"""
    rate: float = 0.02
    """largest step of tables and scales, relative to their root mean square"""
    norm_rate: float = 0.002
    """the same of norms and biases"""
    head_rate: float = 0.0
    """the same of the head, where it is a matrix of its own; 0 = it stands still"""
    embedding_rate: float = 0.0
    """the same of the embedding, where that is one"""
    embedding_steps: int = 0
    """steps that the embedding takes alone, beforehand, towards what the first block answers; for whole models"""
    weight_rate: float = 0.0
    """the same of the blocks' linears that are not quantized"""
    moves: float = 0.0
    """fraction of the codes that may move at a time; 0 = codes stand still"""
    move_rate: float = 0.03
    """largest step of the weights behind the codes, relative to their root mean square"""
    guide: float = 0.0
    """weight of what the blocks' outputs say, beside the logits; for whole models"""
    precision: str = "auto"
    """float32, bfloat16 (matrix products only), or auto: bfloat16 where the hardware multiplies it"""

    def __post_init__(self) -> None:
        bounds = {"steps": (0, 1_000_000), "samples": (2, 1_000_000), "batch": (1, 65536), "embedding_steps": (0, 1_000_000)}
        bounds |= dict.fromkeys(("rate", "norm_rate", "head_rate", "embedding_rate", "weight_rate", "moves", "move_rate"), (0, 1))
        bounds["guide"] = (0, 1000)
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise VoroqError(f"tuning {name}={getattr(self, name):g} is out of range; give {low} to {high}")
        if self.embedding_steps and not self.embedding_rate:
            raise VoroqError("tuning embedding_steps are for an embedding that is tuned at all: give an embedding_rate")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise VoroqError(f"tuning precision={self.precision!r} is unknown; choose auto, float32 or bfloat16")

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that computes products in `precision` on `device`."""
        half = self.precision == "bfloat16" or (self.precision == "auto" and multiplies_bfloat16(device))
        return torch.autocast(device.type, torch.bfloat16, enabled=half)


def held_out(count: int, seed: int) -> tuple[Int[Tensor, "train"], Int[Tensor, "held"]]:
    """Which of `count` windows to train on and which to choose by."""
    if count < 2:
        raise VoroqError("tuning needs at least 2 calibration windows, one to train on and one to choose by; give more --samples")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, min(HELD_OUT, count // 8))
    return order[held:], order[:held]


class Loop:
    """Parameters, their Adam moments, the step, and the best parameters so far.

    sites    the quantized linears, whose stored parameters are tuned
    plain    other parameters that are, each with its rate
    loss     mean loss of some windows, given as indices; it is called with at most `at_once` of them
    windows  indices to train on, indices to choose by
    guided   the loss to train on, where it is not the one to choose by
    """

    def __init__(
        self,
        sites: Mapping[str, Trainable],
        plain: Mapping[str, tuple[nn.Parameter, float]],
        loss: Callable[[Int[Tensor, "w"]], Tensor],
        windows: tuple[Int[Tensor, "train"], Int[Tensor, "held"]],
        tuning: Tuning,
        *,
        at_once: int,
        seed: int,
        guided: Callable[[Int[Tensor, "w"]], Tensor] | None = None,
    ) -> None:
        self.guided = guided or loss
        self.sites, self.loss, self.tuning, self.at_once, self.seed = sites, loss, tuning, at_once, seed
        self.train, self.held = windows
        stored = {f"{name}.stored.{key}": p for name, site in sites.items() for key, p in site.stored.items()}
        rated = dict(sorted({**{name: (p, tuning.rate) for name, p in stored.items()}, **plain}.items()))
        self.parameters = {name: p for name, (p, _) in rated.items()}
        groups = []
        for p, rate in rated.values():
            p.requires_grad_(True)
            groups.append({"params": [p], "base": rate * float(p.detach().square().mean().sqrt().clamp_min(1e-8))})
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
        self.step = 0
        self.first = self.best = math.inf
        self.kept: dict[str, Tensor] = {}
        self.latents: dict[str, Latent] = {}
        if tuning.moves:
            for name, site in sites.items():
                site.watch = True
                self.latents[name] = Latent(site.quantized().stored())

    def run(self, *, checkpoint: Callable[["Loop"], None] | None = None, progress: Callable[[int, float], None] | None = None) -> None:
        """All steps that are left, and then the best state. `checkpoint` is called at every look, `progress` with step and loss.

        Raises VoroqError where the loss stops being finite.
        """
        while self.step < self.tuning.steps:
            if self.step % max(CHECK_EVERY, -(-self.tuning.steps // 20)) == 0:
                self.look()
                if checkpoint is not None:
                    checkpoint(self)
            loss = self.advance()
            if progress is not None:
                progress(self.step, loss)
        self.look()
        self.adopt()

    def advance(self) -> float:
        """One optimiser step; its mean loss."""
        fraction = min(1.0, (self.step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.step / self.tuning.steps))
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * fraction
        rows = self.train[self._batch(self.step)]
        self.adam.zero_grad(set_to_none=True)
        total = 0.0
        for part in rows.split(self.at_once):
            loss = self.guided(part) * (part.shape[0] / rows.shape[0])
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise VoroqError(f"tuning: the loss is no longer finite at step {self.step}; give a smaller rate than {self.tuning.rate:g}")
        self.adam.step()
        self.step += 1
        self._move(fraction)
        return total

    @torch.no_grad()
    def look(self) -> None:
        """Measure the held-out windows, and keep the parameters if they are the best so far."""
        loss = sum(float(self.loss(part)) * part.shape[0] for part in self.held.split(self.at_once)) / self.held.shape[0]
        if self.first == math.inf:
            self.first = loss
        if loss < self.best:
            self.best = loss
            self.kept = {name: t.clone() for name, t in self._model().items()}

    def adopt(self) -> None:
        """Go back to the best."""
        self._load(self.kept)

    @torch.no_grad()
    def quantized(self) -> dict[str, Quantized]:
        """The sites as they are now, on the CPU, without gradients."""
        found = {name: site.quantized() for name, site in self.sites.items()}
        return {name: with_reals(q, {key: t.detach().cpu() for key, t in reals(q).items()}) for name, q in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs."""
        tensors = {f"now/{name}": t for name, t in self._model().items()} | {f"best/{name}": t for name, t in self.kept.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}/{name}": t for key, t in self.adam.state.get(p, {}).items()}
        for name, latent in self.latents.items():
            tensors |= {f"latent/{key}/{name}": t for key, t in latent.state().items()}
        return {**tensors, "losses": torch.tensor([self.step, self.first, self.best], dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        step, self.first, self.best = tensors["losses"].tolist()
        self.step = int(step)
        self._load({name.removeprefix("now/"): t for name, t in tensors.items() if name.startswith("now/")})
        self.kept = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
        for name, p in self.parameters.items():
            self.adam.state[p] = _remembered(tensors, "", name)
        for name, latent in self.latents.items():
            latent.restore(tensors[f"latent/weight/{name}"], _remembered(tensors, "latent/", name))

    def _model(self) -> dict[str, Tensor]:
        """What makes the model: parameters and, where they move, codes."""
        codes = {f"{name}/codes/{i}": t for name in self.latents for i, t in enumerate(self.sites[name].codes)}
        return {**{name: p.detach() for name, p in self.parameters.items()}, **codes}

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(state[name])
        for name in self.latents:
            self.sites[name].codes = tuple(state[f"{name}/codes/{i}"].clone() for i in range(len(self.sites[name].codes)))

    @torch.no_grad()
    def _move(self, fraction: float) -> None:
        for name, latent in self.latents.items():
            site = self.sites[name]
            if site.gradient is not None:  # an expert may have had no tokens
                latent.step(site.gradient, self.tuning.move_rate * fraction)
            site.gradient = None
            if self.step % MOVE_EVERY == 0:
                site.codes = tuple(_moved(site.quantized(), latent, self.tuning.moves))

    def _batch(self, step: int) -> Int[Tensor, "batch"]:
        """Places in `train` of the windows of a step: epochs of all windows, each in an order of its own."""
        count, size = self.train.shape[0], min(self.tuning.batch, self.train.shape[0])
        per_epoch = count // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed((self.seed << 20) + epoch))
        return order[place * size : (place + 1) * size]


def _remembered(tensors: Mapping[str, Tensor], kind: str, name: str) -> dict[str, Tensor]:
    """Copies of what the optimiser remembered of `name`, which `state` put under `kind`; nothing of what had not moved."""
    return {key: tensors[f"{kind}{key}/{name}"].clone() for key in _ADAM if f"{kind}{key}/{name}" in tensors}


def _moved(q: Quantized, latent: Latent, limit: float) -> Iterator[Tensor]:
    for band, codes in zip(q.bands, q.codes, strict=True):
        yield repick(band, codes, latent.weight[:, band.start : band.stop], limit)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for products of bfloat16 matrices."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
