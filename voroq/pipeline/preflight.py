"""Everything that can be refused or decided before the first block: the plan, the data, the room on disk.

A run of hours must not end at its last minute for a reason that was there at its first.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

import voroq
from voroq.errors import VoroqError
from voroq.methods import METHODS, VPTQ, Method
from voroq.pipeline.blocks import Site
from voroq.pipeline.calibration import DEFAULT_SAMPLES, Texts, calibration_windows
from voroq.pipeline.model import OpenModel
from voroq.pipeline.plan import Budget, Plan
from voroq.pipeline.progress import Progress
from voroq.pipeline.source import Source
from voroq.pipeline.text import default_context
from voroq.pipeline.tokenizer import load_tokenizer
from voroq.pipeline.work import describe

TOKENS_PER_BATCH = 4096
"""Tokens in one forward pass of a block."""
ACTIVATIONS_IN_MEMORY = 2 << 30
"""Bytes of calibration activations above which they go to a file in the output folder."""
LEAST_COVERAGE = 0.5
"""Share of the blocks' weights that must be quantizable for a run to be worth starting."""


@dataclass(frozen=True)
class Prepared:
    """A run that may start. `settings` is what a resumed run must agree with; `bytes` the room it needs on disk."""

    plan: Plan
    layout: str
    dtype: torch.dtype
    windows: Int[Tensor, "windows ctx"] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    methods: tuple[Method, ...] = field(repr=False)
    bytes: int


def prepare(
    model: OpenModel,
    plan: Plan | Budget | Method,
    *,
    calibration: Texts,
    samples: int | None,
    context: int | None,
    mode: str,
    seed: int,
    progress: Progress,
) -> Prepared:
    """Check and decide. Raises VoroqError for a plan, a text or a model that cannot be run."""
    origin = model.source
    sites = [site for index in range(model.n_blocks) for site in model.sites(index)]
    _check_coverage(model, sites)
    dtype = _stored_dtype(origin, progress)
    plan = resolve(plan, sites, dtype)
    _check_shared(model, plan)
    methods = {site.name: plan.method_for(site.name) for site in sites}
    used = tuple(method for method in methods.values() if method is not None)
    context = window_length(model, context)
    windows, fingerprint = calibration_windows(
        load_tokenizer(origin),
        calibration,
        samples=DEFAULT_SAMPLES if samples is None else samples,
        context=context,
        seed=seed,
        progress=progress,
    )
    check_tokens(windows, model)
    settings = {
        "source": origin.fingerprint(),
        "methods": {name: None if method is None else describe(method) for name, method in methods.items()},
        "calibration": f"{windows.shape[0]} windows of {context} tokens with the hash {fingerprint[:16]}",
        "mode": mode,
        "seed": seed,
        "device": model.device.type,
        "version": voroq.__version__,
    }
    layout = "vptq" if all(isinstance(method, VPTQ) for method in used) else "voroq"
    return Prepared(plan, layout, dtype, windows, settings, used, _predicted_bytes(origin, sites, plan, dtype, windows, model))


def resolve(plan: Plan | Budget | Method, sites: Sequence[Site], dtype: torch.dtype) -> Plan:
    """The plan for these sites, tables and scales stored in `dtype`. Raises VoroqError for one that leaves all as it is, or tears experts
    of a layer apart."""
    if isinstance(plan, Budget):
        return plan.plan([(site.name, site.shape) for site in sites], float_bits=8 * dtype.itemsize)
    if not isinstance(plan, Plan):
        plan = Plan(plan)
    if all(plan.method_for(site.name) is None for site in sites):
        raise VoroqError("the plan leaves every linear of the model as it is; give a default method, or a rule that matches a site")
    stacks: dict[str, set[bool]] = defaultdict(set)
    for site in sites:
        if site.expert:
            stacks[site.name.rpartition(".experts.")[0]].add(plan.method_for(site.name) is None)
    for stack, kinds in stacks.items():
        if len(kinds) > 1:
            raise VoroqError(f"the plan quantizes some experts of {stack} and not others; give all experts of a layer a method, or none")
    return plan


def _check_shared(model: OpenModel, plan: Plan) -> None:
    """Refuse a plan that quantizes some of the sites that share one tensor on disk: the others' part would be lost with it."""
    for name in (name for index in range(model.n_blocks) for name in model.block_tensors(index)):
        kinds = {plan.method_for(site) is None: site for site in model.site_of(name) or ()}
        if len(kinds) > 1:
            raise VoroqError(
                f"tensor {name} holds the weights of both {kinds[False]}, which the plan quantizes, and {kinds[True]}, which it "
                f"leaves as it is; give both a method, or neither"
            )


def _check_coverage(model: OpenModel, sites: Sequence[Site]) -> None:
    """Refuse a run that could touch less than half of the blocks' weights."""
    others = {name: shape for index in range(model.n_blocks) for name, shape in model.unquantizable(index).items()}
    covered, missed = sum(math.prod(site.shape) for site in sites), sum(math.prod(shape) for shape in others.values())
    if covered < LEAST_COVERAGE * (covered + missed):
        largest = sorted(others, key=lambda name: -math.prod(others[name]))[:3]
        raise VoroqError(
            f"only {covered / max(covered + missed, 1):.0%} of the weights in the model's blocks are nn.Linear or stacked experts of a "
            f"known form; the rest would stay as it is, e.g. {', '.join(f'{name} {list(others[name])}' for name in largest)}; not started"
        )


def window_length(model: OpenModel, asked: int | None) -> int:
    """What was asked for, else what the model was made for, at most 2048. Raises VoroqError where that exceeds its positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is not None and positions is not None and asked > positions:
        raise VoroqError(f"windows of {asked} tokens exceed the model's {positions} positions; give a smaller --context")
    return default_context(positions) if asked is None else asked


def windows_at_once(context: int) -> int:
    """Windows in one forward pass of a block."""
    return max(1, TOKENS_PER_BATCH // context)


def check_tokens(windows: torch.Tensor, model: OpenModel) -> None:
    size = getattr(model.config, "vocab_size", None)
    if size is not None and int(windows.max()) >= size:
        raise VoroqError(f"the tokenizer makes token {int(windows.max())} and the model knows {size}; the folder mixes two models")


def _stored_dtype(origin: Source, progress: Progress) -> torch.dtype:
    """The dtype tables and scales are stored in: the one most of the model's bytes have."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for entry in origin.tensors.values():
        sizes[entry.dtype] += entry.size
    dtype = max(sizes, key=sizes.__getitem__)
    if dtype in (torch.float16, torch.bfloat16):
        return dtype
    if dtype == torch.float32:
        progress.warn("the model is stored in float32, so tables and scales are too; convert it to 16 bits first to save space")
    return torch.float32


def _predicted_bytes(origin: Source, sites: Sequence[Site], plan: Plan, dtype: torch.dtype, windows: torch.Tensor, model: OpenModel) -> int:
    """Room the run needs: what is copied, what is made (a pessimistic 8 bits where unknown), and activations that spill."""
    weights = sum(math.prod(site.shape) for site in sites)
    kept = max(0, origin.bytes - weights * dtype.itemsize)
    made = 0
    for site in sites:
        method = plan.method_for(site.name)
        made += _bytes_of(method, site.shape, dtype)
    states = windows.numel() * getattr(model.config, "hidden_size", 0) * 4
    return kept + made + (states if states > ACTIVATIONS_IN_MEMORY else 0) + (1 << 20)


def _bytes_of(method: Method | None, shape: tuple[int, int], dtype: torch.dtype) -> int:
    if method is None:
        return math.prod(shape) * dtype.itemsize
    return method.stored_bits(shape, 8 * dtype.itemsize) // 8 if isinstance(method, tuple(METHODS.values())) else math.prod(shape)
