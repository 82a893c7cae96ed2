"""Moments of the inputs of every site of a block, from one pass of the calibration windows through it.

Linears that read the very same tensor (q, k, v; gate, up) share one `Moments`. Batches come in a fixed order and are summed in
float32, so the result depends on neither devices nor their number. An expert sees only the tokens routed to it.
"""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.moments import Moments, blend, merge
from voroq.pipeline.activations import Activations
from voroq.pipeline.model import OpenModel
from voroq.pipeline.weights import finite


@torch.no_grad()
def observe_block(
    model: OpenModel,
    block: nn.Module,
    index: int,
    inputs: Activations,
    batch: int,
    *,
    sites: Collection[str] | None = None,
    outputs: Activations | None = None,
) -> tuple[dict[str, Moments], dict[str, int]]:
    """(moments, tokens seen) by site of block `index` over all windows of `inputs`, `batch` at a time as in `capture`.

    `sites` limits the sites observed (the moments of all experts may not fit at once). With `outputs` the block's outputs are
    stored too; it may be `inputs` itself. Moments are on the model's device. Raises VoroqError naming the site whose inputs, or
    the block whose outputs, are NaN or infinite. One batch is run twice, to find out which sites share their input.
    """
    linears = {name: linear for name, linear in model.linears(block, index).items() if sites is None or name in sites}
    leaders = _leaders(model, block, index, linears, inputs.read(0, min(batch, inputs.shape[0])))
    sums = {name: _Sums(name, linear) for name, linear in linears.items() if leaders[name] == name}
    hooks = [linears[name].register_forward_pre_hook(found.add) for name, found in sums.items()]
    try:
        _run(model, block, index, inputs, batch, outputs)
    finally:
        for hook in hooks:
            hook.remove()
    shared = {name: found.moments() for name, found in sums.items()}
    moments = {name: shared[leaders[name]] for name in linears}
    return moments, {name: found.count for name, found in moments.items()}


@torch.no_grad()
def run_block(model: OpenModel, block: nn.Module, index: int, inputs: Activations, batch: int, outputs: Activations) -> None:
    """Store the outputs of block `index` on all windows of `inputs`; `outputs` may be `inputs` itself.

    Raises VoroqError naming the block if an output is NaN or infinite.
    """
    _run(model, block, index, inputs, batch, outputs)


@torch.no_grad()
def observe_shift(
    model: OpenModel, block: nn.Module, index: int, originals: Activations, inputs: Activations, batch: int, *, sites: Collection[str]
) -> dict[str, Float[Tensor, "in in"]]:
    """sum (x - x') x'^T for each of `sites` in block `index`: x what it sees when the block sees `originals`, x' with `inputs`.

    An expert that sees other tokens then is left out: its two inputs cannot be told apart from one another's.
    """
    linears = {name: linear for name, linear in model.linears(block, index).items() if name in sites}
    leaders = _leaders(model, block, index, linears, inputs.read(0, min(batch, inputs.shape[0])))
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str):
        return lambda _, args: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).float())

    own = [name for name in linears if leaders[name] == name]
    sums = {name: torch.zeros(linears[name].in_features, linears[name].in_features, device=model.device) for name in own}
    hooks = [linears[name].register_forward_pre_hook(watch(name)) for name in own]
    try:
        for start, hidden in inputs.batches(batch):
            seen.clear()
            for states in (originals.read(start, start + hidden.shape[0]), hidden):
                model.forward_block(block, index, states.to(model.device))
            for name in list(sums):
                pair = seen.get(name, [])
                if len(pair) == 2 and pair[0].shape == pair[1].shape:
                    sums[name].addmm_((pair[0] - pair[1]).T, pair[1])
                else:
                    del sums[name]
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums[leaders[name]] for name in linears if leaders[name] in sums}


def borrow_prior(siblings: Mapping[str, Moments], minimum: int) -> tuple[dict[str, Moments], tuple[str, ...]]:
    """`siblings` (one projection of every expert of a layer) with the ones that saw fewer than `minimum` tokens topped up, and
    the names of those.

    What is missing to `minimum` tokens is taken from the mean of all siblings' tokens, so expert e with n_e tokens gets

        H = (n_e H_e + (minimum - n_e) P) / minimum,     P = sum_s second_s / sum_s n_s

    If no sibling saw a token, P is the identity.
    """
    total = sum(moments.count for moments in siblings.values())
    poor = tuple(name for name, moments in siblings.items() if moments.count < minimum)
    if not poor:
        return dict(siblings), ()
    parts = list(siblings.values())
    pooled = parts[0]
    for part in parts[1:]:
        pooled = merge(pooled, part)
    if total:
        second, mean = pooled.second / total, pooled.first / total
    else:
        second, mean = torch.eye(len(pooled.first), dtype=pooled.second.dtype, device=pooled.second.device), pooled.first

    def top_up(moments: Moments) -> Moments:
        lack = minimum - moments.count
        share = moments.count / minimum
        outputs, groups = blend(moments.outputs, pooled.outputs, share), blend(moments.groups, pooled.groups, share)
        return Moments(moments.second + lack * second, moments.first + lack * mean, minimum, outputs, groups)

    return {name: top_up(moments) if name in poor else moments for name, moments in siblings.items()}, poor


class _Sums:
    """Moments of one linear's inputs, accumulated in place."""

    def __init__(self, name: str, linear: nn.Linear) -> None:
        self.name = name
        self.second = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        self.first = torch.zeros(linear.in_features, device=linear.weight.device)
        self.count = 0

    def add(self, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()  # [tok in]
        total = x.sum(0)
        if not torch.isfinite(total).all():
            raise VoroqError(f"the inputs of {self.name} hold NaN or infinity; the model is damaged or overflows its dtype on this text")
        self.first += total
        self.second.addmm_(x.T, x)
        self.count += x.shape[0]

    def moments(self) -> Moments:
        if not torch.isfinite(self.second.diagonal()).all():
            raise VoroqError(f"the inputs of {self.name} are too large for float32 moments; the model is damaged")
        return Moments(self.second, self.first, self.count)


def _leaders(
    model: OpenModel, block: nn.Module, index: int, linears: Mapping[str, nn.Linear], hidden: Float[Tensor, "b ctx d"]
) -> dict[str, str]:
    """For every site the first site with the very same inputs (itself if none).

    The inputs are kept alive during the pass: an address identifies a tensor only as long as its memory is not given to another.
    """
    alive: list[Tensor] = []
    seen: dict[str, list[tuple]] = {name: [] for name in linears}

    def watch(name: str):
        def hook(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            alive.append(x)
            seen[name].append((x.data_ptr(), x.shape, x.stride(), x.dtype, x._version))

        return hook

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        model.forward_block(block, index, hidden.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    leader: dict[tuple, str] = {}
    # A site that was not called (an expert without tokens) shares with nobody.
    return {name: leader.setdefault(tuple(keys), name) if keys else name for name, keys in seen.items()}


def _run(model: OpenModel, block: nn.Module, index: int, inputs: Activations, batch: int, outputs: Activations | None) -> None:
    for start, hidden in inputs.batches(batch):
        hidden = model.forward_block(block, index, hidden.to(model.device))
        if not finite(hidden):
            raise VoroqError(f"the outputs of {model.block_name(index)} hold NaN or infinity; the model is damaged or overflows its dtype")
        if outputs is not None:
            outputs.write(start, hidden)
