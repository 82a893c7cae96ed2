"""What rounding each site costs the model: the slope that a bit allocation needs, from one pass over the blocks.

Every site is rounded once, at a probe setting, and its error E is put into the Fisher matrix itself, token by token,

    KL = 1/2 E[(g^T E x)^2]          x the input, g the gradient of log q(sampled label) at the output

without the Kronecker product that rounding works with: rounding hides its errors where that product is too small, in the gates of an
MLP most of all (there by 1.3 to 2 times on the bundled model). Divided by the distortion expected at the probe setting this is the
site's slope, and slope x distortion predicts what other settings cost. (HIGGS, Malinovskii et al. 2024, measures slopes by perturbing
one layer at a time.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.methods import VPTQ, is_slow_two_sided
from voroq.methods.vptq import Thinning, column_costs
from voroq.numerics.linalg import damped, padded_without
from voroq.pipeline.activations import Activations
from voroq.pipeline.channels import DAMPING, Channels
from voroq.pipeline.gradients import gradient_windows, observe_outputs, output_gradients, pull_through
from voroq.pipeline.model import OpenModel
from voroq.pipeline.observe import observe_block, run_block
from voroq.pipeline.plan import Plan
from voroq.pipeline.preflight import ACTIVATIONS_IN_MEMORY, windows_at_once
from voroq.pipeline.progress import Progress
from voroq.pipeline.work import generator
from voroq.quantized import narrow


@dataclass(frozen=True)
class Worth:
    """KL per token of rounding a site alone at the probe's setting, and for VPTQ what its cheapest columns are worth."""

    kl: float
    thinning: Thinning | None
    tighter: tuple[float, ...] = ()
    """Of linears that make channels, for every number of those that may be left out: how many times as much the errors of the others cost
    then, at the same bits for each."""


@dataclass(frozen=True)
class Worths:
    """What the `sites` are worth, and the KL per token of every number of channels that may be left out, in all blocks at once."""

    sites: dict[str, Worth]
    left_out: tuple[float, ...]


def probe(
    model: OpenModel,
    plan: Plan,
    windows: Int[Tensor, "windows ctx"],
    *,
    dtype: torch.dtype,
    seed: int,
    folder: Path,
    progress: Progress,
    channels: Channels | None = None,
) -> Worths:
    """What each site is worth, rounded as `plan` says, tables in `dtype`, and what those of MLPs are with fewer of the `channels`, if
    any. One block is in memory; `folder` takes what spills.

    Raises VoroqError for a model without a head, or where its gradients are not finite.
    """
    if model.skeleton.get_output_embeddings() is None:
        name = model.source.name
        raise VoroqError(f"{name} has no language model head, so what its layers are worth cannot be measured; give --bits alone")
    batch = windows_at_once(windows.shape[1])
    windows = windows[: gradient_windows(*windows.shape, batch)]
    found: dict[str, Worth] = {}
    left = torch.zeros(len(channels.steps) if channels else 0, windows.numel())
    with model.capture(windows, batch, limit=ACTIVATIONS_IN_MEMORY, folder=folder) as states:
        room = {"limit": ACTIVATIONS_IN_MEMORY, "folder": folder}
        gradients = output_gradients(model, windows, states, batch, seed=seed, progress=progress, **room)
        for index in range(model.n_blocks):
            progress.stage(f"probing block {index + 1} of {model.n_blocks}")
            block = model.load_block(index)
            found |= _probe_block(model, block, index, states, gradients[index], batch, plan, dtype, seed, channels, left)
            gradients[index].close()
            model.drop_block(index)
    return Worths(found, tuple((left.double().square().mean(1) / 2).tolist()))


def _probe_block(
    model: OpenModel,
    block: nn.Module,
    index: int,
    states: Activations,
    gradients: Activations,
    batch: int,
    plan: Plan,
    dtype: torch.dtype,
    seed: int,
    channels: Channels | None,
    left_out: Float[Tensor, "steps tokens"],
) -> dict[str, Worth]:
    chosen = {site.name: plan.method_for(site.name) for site in model.sites(index)}
    names = [name for name, method in chosen.items() if method is not None]
    outputs = observe_outputs(model, block, index, states, gradients, batch, sites=names)
    moments, _ = observe_block(model, block, index, states, batch, sites=names)
    linears, errors, thinnings = model.linears(block, index), {}, {}
    weights = {name: linears[name].weight.detach().float() for name in names}
    for name, w in weights.items():
        known = moments[name]
        if not is_slow_two_sided(chosen[name], (model.device,)):
            known = replace(known, outputs=outputs[name])
        made = chosen[name](w, known, generator(seed, name))
        errors[name] = (w - narrow(made, dtype).dequantize().to(w.device))[None]
        if isinstance(chosen[name], VPTQ):
            thinnings[name] = Thinning.of(w, known, chosen[name].damping)
    tighter: dict[str, tuple[float, ...]] = {}
    for down, *ups in [mlp for mlp in channels.mlps if set(mlp) <= set(names)] if channels else ():
        h, _ = damped(moments[down].hessian(), DAMPING)
        order = column_costs(weights[down], h).argsort(stable=True)
        left = [weights[down] - padded_without(weights[down], h, order[:gone]) for gone in channels.steps]
        errors[down] = torch.stack([errors[down][0], *left])
        dealt = any(set(ups) <= set(group) for groups in model.interleaved.values() for group in groups)
        for up in ups:
            costs = weights[up].square().sum(1) * outputs[up].diagonal()
            tighter[up] = tuple(tightened(costs.reshape(-1, channels.width)[:, order], gone, dealt) for gone in channels.steps)
    found = responses(model, block, index, states, gradients, batch, errors)
    for _, *left in found.values():
        if left:
            left_out += torch.stack(left)
    run_block(model, block, index, states, batch, states)
    tokens = gradients.shape[0] * gradients.shape[1]
    kl = {name: float(own.double().square().sum()) / 2 / tokens for name, (own, *_) in found.items()}
    return {name: Worth(kl[name], thinnings.get(name), tighter.get(name, ())) for name in found}


def tightened(costs: Float[Tensor, "n channels"], gone: int, dealt: bool) -> float:
    """How many times as much the errors of channels cost without the first `gone` of them, for what equal errors in each `costs`. Where
    channels are dealt out to tiles, cheap ones make room for the others in each, which is missing then."""
    costs = costs.double().clamp_min(1e-30)
    means = [float(part.log().mean().exp() if dealt else part.mean()) for part in (costs[:, gone:], costs)]
    return (1 - gone / costs.shape[1]) * means[0] / means[1]


def responses(
    model: OpenModel,
    block: nn.Module,
    index: int,
    inputs: Activations,
    gradients: Activations,
    batch: int,
    errors: Mapping[str, Float[Tensor, "n out in"]],
) -> dict[str, Float[Tensor, "n tokens"]]:
    """g^T E x, token by token, for each of the errors E of each site's weight; half its mean square is the divergence they cause."""
    found: dict[str, list[Tensor]] = {name: [] for name in errors}

    def collect(name: str, x: Tensor, gradient: Tensor) -> None:
        g, x = gradient.float().flatten(0, -2), x.float().flatten(0, -2)
        found[name].append(torch.stack([(g * (x @ error.T)).sum(-1) for error in errors[name]]).cpu())

    pull_through(model, block, index, inputs, gradients, batch, sites=errors, collect=collect)
    return {name: torch.cat(parts, 1) if parts else torch.zeros(errors[name].shape[0], 0) for name, parts in found.items()}
