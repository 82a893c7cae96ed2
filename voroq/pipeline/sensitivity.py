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
from voroq.methods.vptq import Thinning
from voroq.pipeline.activations import Activations
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


def probe(
    model: OpenModel, plan: Plan, windows: Int[Tensor, "windows ctx"], *, dtype: torch.dtype, seed: int, folder: Path, progress: Progress
) -> dict[str, Worth]:
    """What each site is worth, rounded as `plan` says, tables in `dtype`. One block is in memory; `folder` takes what spills.

    Raises VoroqError for a model without a head, or where its gradients are not finite.
    """
    if model.skeleton.get_output_embeddings() is None:
        name = model.source.name
        raise VoroqError(f"{name} has no language model head, so what its layers are worth cannot be measured; give --bits alone")
    batch = windows_at_once(windows.shape[1])
    windows = windows[: gradient_windows(*windows.shape, batch)]
    found: dict[str, Worth] = {}
    with model.capture(windows, batch, limit=ACTIVATIONS_IN_MEMORY, folder=folder) as states:
        room = {"limit": ACTIVATIONS_IN_MEMORY, "folder": folder}
        gradients = output_gradients(model, windows, states, batch, seed=seed, progress=progress, **room)
        for index in range(model.n_blocks):
            progress.stage(f"probing block {index + 1} of {model.n_blocks}")
            block = model.load_block(index)
            found |= _probe_block(model, block, index, states, gradients[index], batch, plan, dtype, seed)
            gradients[index].close()
            model.drop_block(index)
    return found


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
) -> dict[str, Worth]:
    chosen = {site.name: plan.method_for(site.name) for site in model.sites(index)}
    names = [name for name, method in chosen.items() if method is not None]
    outputs = observe_outputs(model, block, index, states, gradients, batch, sites=names)
    moments, _ = observe_block(model, block, index, states, batch, sites=names)
    linears, errors, thinnings = model.linears(block, index), {}, {}
    for name in names:
        w = linears[name].weight.detach().float()
        known = moments[name]
        if not is_slow_two_sided(chosen[name], (model.device,)):
            known = replace(known, outputs=outputs[name])
        made = chosen[name](w, known, generator(seed, name))
        errors[name] = w - narrow(made, dtype).dequantize().to(w.device)
        if isinstance(chosen[name], VPTQ):
            thinnings[name] = Thinning.of(w, known, chosen[name].damping)
    found = divergences(model, block, index, states, gradients, batch, errors)
    run_block(model, block, index, states, batch, states)
    return {name: Worth(kl, thinnings.get(name)) for name, kl in found.items()}


def divergences(
    model: OpenModel,
    block: nn.Module,
    index: int,
    inputs: Activations,
    gradients: Activations,
    batch: int,
    errors: Mapping[str, Float[Tensor, "out in"]],
) -> dict[str, float]:
    """1/2 sum over tokens of (g^T E x)^2, over all positions, for the error E of each site's weight."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in errors}

    def collect(name: str, x: Tensor, gradient: Tensor) -> None:
        sums[name] += (gradient.float() * (x.float() @ errors[name].T)).sum(-1).square().double().sum().cpu()

    pull_through(model, block, index, inputs, gradients, batch, sites=errors, collect=collect)
    return {name: float(total) / 2 / (gradients.shape[0] * gradients.shape[1]) for name, total in sums.items()}
