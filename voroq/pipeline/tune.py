"""Whole-model tuning: the quantized model learns to say what the original says.

    minimise   mean over tokens of  KL( softmax(original logits) || softmax(quantized logits) )

over tables, scales, shifts and the one-dimensional parameters (norms, biases), by Adam with a warm-up and a cosine. Codes stand
still, or move along the gradient a few at a time (`tuning/moves.py`). Some of the calibration windows are held out: the state that
did best on them is kept, and if none beat the untuned one nothing changes. Step sizes are relative to the size of each parameter,
so they mean the same in every model. (The paper's end-to-end stage, whose code was never released.)

Both models are in memory in float32 while this runs. The state is saved as it goes; an interrupted tuning continues from there
and ends with the same bytes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.packed.files import Entry, write_safetensors
from voroq.pipeline.progress import Progress
from voroq.quantized import Quantized, reals, with_reals
from voroq.tuning.losses import divergence
from voroq.tuning.moves import Latent, repick
from voroq.tuning.trainable import Trainable

HELD_OUT = 32
"""Calibration windows kept from training to choose by, at most an eighth of all."""
CHECK_EVERY = 20
"""Steps between looks at the held-out windows; also between saves."""
TOKENS_AT_ONCE = 2048
"""Tokens of one forward and backward; a step adds up as many as its batch needs."""
MOVE_EVERY = 4
"""Steps between moves of codes."""
_WARM_UP = 10


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
    moves: float = 0.0
    """fraction of the codes that may move at a time; 0 = codes stand still"""
    move_rate: float = 0.03
    """largest step of the weights behind the codes, relative to their root mean square"""
    precision: str = "auto"
    """float32, bfloat16 (matrix products only), or auto: bfloat16 where the hardware multiplies it"""

    def __post_init__(self) -> None:
        bounds = {"steps": (0, 1_000_000), "samples": (2, 1_000_000), "batch": (1, 65536)}
        bounds |= dict.fromkeys(("rate", "norm_rate", "moves", "move_rate"), (0, 1))
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise VoroqError(f"tuning {name}={getattr(self, name):g} is out of range; give {low} to {high}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise VoroqError(f"tuning precision={self.precision!r} is unknown; choose auto, float32 or bfloat16")


@dataclass(frozen=True)
class Tuned:
    """What came of it: the sites and the other parameters as tuned, and the mean KL on held-out windows before and after."""

    sites: dict[str, Quantized] = field(repr=False)
    others: dict[str, Tensor] = field(repr=False)
    before: float
    after: float
    steps: int


def tune(
    original: nn.Module,
    student: nn.Module,
    windows: Int[Tensor, "windows ctx"],
    tuning: Tuning,
    *,
    free: frozenset[str],
    seed: int,
    state: Path,
    progress: Progress,
) -> Tuned:
    """Tune `student`, whose quantized linears are `Trainable`s, towards `original`, and say what became of its parameters.

    Besides what the `Trainable`s store, the one-dimensional parameters among `free` are tuned. `state` is the file the progress is
    saved to and continued from. Raises VoroqError where the loss stops being finite.
    """
    run = _Run(original, student, tuning, _split(windows, seed), free, seed)
    run.restore(state)
    while run.step < tuning.steps:
        if run.step % CHECK_EVERY == 0:
            run.look()
            run.save(state)
        loss = run.advance()
        progress.stage(f"tuning, step {run.step} of {tuning.steps}, KL {loss:.4f}")
    run.look()
    run.adopt()
    with torch.no_grad():
        sites = {name: _detached(site.quantized()) for name, site in run.sites.items()}
    others = {name: p.detach() for name, p in run.parameters.items() if name in run.plain}
    return Tuned(sites, others, run.first, run.best, run.step)


def _split(windows: Int[Tensor, "windows ctx"], seed: int) -> tuple[Tensor, Tensor]:
    """Windows to train on and windows to choose by."""
    if windows.shape[0] < 2:
        raise VoroqError("tuning needs at least 2 calibration windows, one to train on and one to choose by; give more --samples")
    held = max(1, min(HELD_OUT, windows.shape[0] // 8))
    order = torch.randperm(windows.shape[0], generator=torch.Generator().manual_seed(seed))
    return windows[order[held:]], windows[order[:held]]


class _Run:
    """The loop's state: parameters, their Adam moments, the step, and the best parameters so far."""

    def __init__(
        self, original: nn.Module, student: nn.Module, tuning: Tuning, data: tuple[Tensor, Tensor], free: frozenset[str], seed: int
    ) -> None:
        self.original, self.student, self.tuning, self.seed = original, student, tuning, seed
        self.train, self.held = data
        self.device = next(original.parameters()).device
        self.precision = tuning.precision if tuning.precision != "auto" else _native_precision(self.device)
        student.requires_grad_(False)
        stored = {f"{name}.stored." for name, module in student.named_modules() if isinstance(module, Trainable)}
        named = {name: (p, name.rpartition(".")[0] + "." in stored) for name, p in student.named_parameters()}
        self.plain = {name for name, (p, table) in named.items() if not table and p.dim() == 1 and name in free}
        self.parameters = {name: p for name, (p, table) in sorted(named.items()) if table or name in self.plain}
        groups = []
        for name, p in self.parameters.items():
            p.requires_grad_(True)
            rate = tuning.norm_rate if name in self.plain else tuning.rate
            groups.append({"params": [p], "base": rate * float(p.detach().square().mean().sqrt().clamp_min(1e-8))})
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0
        self.first = self.best = math.inf
        self.kept: dict[str, Tensor] = {}
        self.sites = {name: module for name, module in student.named_modules() if isinstance(module, Trainable)}
        self.latents: dict[str, Latent] = {}
        if tuning.moves:
            for name, site in self.sites.items():
                site.watch = True
                self.latents[name] = Latent(site.quantized().stored())

    def advance(self) -> float:
        """One optimiser step; its mean KL."""
        fraction = min(1.0, (self.step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.step / self.tuning.steps))
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * fraction
        rows = self.train[self._batch(self.step)]
        self.adam.zero_grad(set_to_none=True)
        total = 0.0
        for part in self._parts(rows):
            loss = self._divergence(part) * (part.shape[0] / rows.shape[0])
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise VoroqError(f"tuning: the loss is no longer finite at step {self.step}; give a smaller rate than {self.tuning.rate:g}")
        self.adam.step()
        self.step += 1
        self._move(fraction)
        return total

    @torch.no_grad()
    def _move(self, fraction: float) -> None:
        for name, latent in self.latents.items():
            site = self.sites[name]
            if site.gradient is not None:  # an expert may have had no tokens
                latent.step(site.gradient, self.tuning.move_rate * fraction, self.step)
            site.gradient = None
            if self.step % MOVE_EVERY == 0:
                bands = site.quantized().bands
                site.codes = tuple(
                    repick(band, codes, latent.weight[:, band.start : band.stop], self.tuning.moves)
                    for band, codes in zip(bands, site.codes, strict=True)
                )

    def _state(self) -> dict[str, Tensor]:
        """What makes the model: parameters and, where they move, codes."""
        codes = {f"{name}/codes/{i}": t for name in self.latents for i, t in enumerate(self.sites[name].codes)}
        return {**{name: p.detach() for name, p in self.parameters.items()}, **codes}

    @torch.no_grad()
    def _load(self, state: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(state[name])
        for name in self.latents:
            self.sites[name].codes = tuple(state[f"{name}/codes/{i}"].clone() for i in range(len(self.sites[name].codes)))

    @torch.no_grad()
    def look(self) -> None:
        """Measure the held-out windows, and keep the parameters if they are the best so far."""
        loss = sum(float(self._divergence(part)) * part.shape[0] for part in self._parts(self.held)) / self.held.shape[0]
        if self.first == math.inf:
            self.first = loss
        if loss < self.best:
            self.best = loss
            self.kept = {name: t.clone() for name, t in self._state().items()}

    def adopt(self) -> None:
        """Go back to the best."""
        self._load(self.kept)

    def save(self, path: Path) -> None:
        tensors = {f"now/{name}": t for name, t in self._state().items()} | {f"best/{name}": t for name, t in self.kept.items()}
        for name, p in self.parameters.items():
            moments = self.adam.state.get(p, {})
            tensors |= {f"{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}
        for name, latent in self.latents.items():
            tensors |= {f"latent/{key}/{name}": getattr(latent, key) for key in ("weight", "first", "second")}
        tensors["losses"] = torch.tensor([self.step, self.first, self.best], dtype=torch.float64)
        write_safetensors(path, [Entry.of(name, tensor.cpu().contiguous()) for name, tensor in tensors.items()], {})

    def restore(self, path: Path) -> None:
        if not path.is_file():
            return
        tensors = {name: tensor.to(self.device) for name, tensor in load_file(path).items()}
        step, self.first, self.best = tensors["losses"].tolist()
        self.step = int(step)
        self._load({name.removeprefix("now/"): t for name, t in tensors.items() if name.startswith("now/")})
        self.kept = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
        for name, p in self.parameters.items():
            moments = {key: tensors[f"{key}/{name}"].clone() for key in ("exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
            if moments:
                self.adam.state[p] = {"step": torch.tensor(float(self.step)), **moments}
        for name, latent in self.latents.items():
            for key in ("weight", "first", "second"):
                setattr(latent, key, tensors[f"latent/{key}/{name}"].clone())

    def _batch(self, step: int) -> Tensor:
        """Indices of the windows of a step: epochs of all windows, each in an order of its own."""
        count, size = self.train.shape[0], min(self.tuning.batch, self.train.shape[0])
        per_epoch = count // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed((self.seed << 20) + epoch))
        return order[place * size : (place + 1) * size]

    def _parts(self, rows: Int[Tensor, "w ctx"]) -> Iterator[Tensor]:
        yield from rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1]))

    def _divergence(self, rows: Int[Tensor, "w ctx"]) -> Tensor:
        rows = rows.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            with torch.no_grad():
                target = self.original(input_ids=rows, use_cache=False).logits
            logits = self.student(input_ids=rows, use_cache=False).logits
        return divergence(target, logits)


def _native_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    fast: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if fast() else "float32"


def _detached(q: Quantized) -> Quantized:
    return with_reals(q, {name: t.detach().cpu() for name, t in reals(q).items()})


def student_of(original: nn.Module, sites: Mapping[str, Quantized], whole: Callable[[], nn.Module]) -> nn.Module:
    """A second model with `sites` as `Trainable`s; it shares with `original` whatever does not train."""
    student = whole()
    for name, q in sites.items():
        linear = student.get_submodule(name)
        student.set_submodule(name, Trainable(q, linear.bias))
    theirs: dict[str, Any] = dict(original.named_parameters(remove_duplicate=False))
    for name, p in student.named_parameters(remove_duplicate=False):
        if p.dim() > 1 and name in theirs:
            p.data = theirs[name].data
    return student
