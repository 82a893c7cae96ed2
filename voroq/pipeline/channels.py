"""The channels inside the MLPs of a model: which linears make and read them, and which number in the config is their width.

Neither is known by name: linears are tried as for interleaving, numbers by building the skeleton with another one.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from voroq.errors import VoroqError
from voroq.pipeline.interleave import Inner, inner_of
from voroq.pipeline.model import OpenModel

DAMPING = 0.01
"""Added to the diagonal of second moments, relative to its mean, where channels answer for others."""
PART = 16
"""Channels are left out by sixteenths, one of them where no number is given."""
MOST = 6
"""Sixteenths that are thought of leaving out."""


@dataclass(frozen=True)
class Channels:
    """The channels inside the MLPs of a model, `width` in each, of which `kept` are to stay; what the config calls their number (`key`);
    and the names of the linears of each MLP: which reads them, which make them."""

    width: int
    kept: int
    key: str
    mlps: tuple[tuple[str, ...], ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """How many of them may be left out: none to `MOST` sixteenths."""
        return tuple(part * self.width // PART for part in range(MOST + 1))

    def share(self, model: OpenModel) -> float:
        """How many of the weights of the linears of `model` are left with the `kept`."""
        sites = [site for index in range(model.n_blocks) for site in model.sites(index)]
        return sum(math.prod(self.narrowed(site.name, site.shape, self.width - self.kept)) for site in sites) / model.linear_weights

    def narrowed(self, name: str, shape: tuple[int, int], gone: int) -> tuple[int, int]:
        """The (out, in) of linear `name` without `gone` of the channels."""
        if any(name == down for down, *_ in self.mlps):
            return shape[0], shape[1] - gone
        made = any(name in ups for _, *ups in self.mlps)
        return (shape[0] - shape[0] // self.width * gone, shape[1]) if made else shape


def channels_of(model: OpenModel, kept: int | None = None) -> Channels:
    """The channels of which `kept` are to stay, if None all but a sixteenth. Raises VoroqError for a model that cannot be pruned so."""
    mlps = [shapes_of(model, index) for index in range(model.n_blocks)]
    width = mlps[0].down.in_features
    kept = width - width // PART if kept is None else kept
    if not 1 <= kept < width:
        raise VoroqError(f"{kept} of {width} channels cannot be kept: give 1 to {width - 1}")
    return Channels(width, kept, width_key(model, mlps, kept), tuple(mlp.names for mlp in mlps))


def mlp_of(model: OpenModel, block: nn.Module, index: int) -> Inner:
    """The MLP of `block`, loaded. Raises VoroqError where there is not exactly one that is stored tensor by tensor."""
    name = model.block_name(index)
    found = [inner for module, inner in inner_of(block, name) if inner.is_free(module)]
    if len(found) != 1:
        raise VoroqError(f"{name} has {len(found)} MLPs of plain linears without biases; models with one in every block can be pruned")
    for part in found[0].names:
        if model.plain_source(f"{part}.weight") is None:
            raise VoroqError(f"{part} is not stored as a tensor of its own; save the model with transformers and prune that")
    return found[0]


def shapes_of(model: OpenModel, index: int) -> Inner:
    """The MLP of block `index`, its weights on meta."""
    try:
        return mlp_of(model, model.load_block(index), index)
    finally:
        model.drop_block(index)


def width_key(model: OpenModel, mlps: list[Inner], channels: int) -> str:
    """The name of the number in the config that is the width of all `mlps` and of nothing else."""
    width = mlps[0].down.in_features
    wanted = {f"{name}.weight" for mlp in mlps for name in mlp.names}
    before = {name: p.shape for name, p in model.skeleton.named_parameters()}
    text = model.config.get_text_config()
    for key in [key for key, value in text.to_dict().items() if value == width and not isinstance(value, bool)]:
        config = copy.deepcopy(model.config)
        setattr(config.get_text_config(), key, channels)
        try:
            with torch.device("meta"):
                after = {name: p.shape for name, p in type(model.skeleton)(config).named_parameters()}
        except Exception:  # any other number may be needed as it is
            continue
        if {name for name in after if after[name] != before.get(name, after[name])} == wanted:
            return key
    name = model.source.name
    raise VoroqError(f"no number in the config of {name} is the width ({width}) of its MLPs alone; such models cannot be pruned")


def narrowed_config(config: dict[str, Any], key: str, channels: int) -> dict[str, Any]:
    """`config` with so many channels under `key`, wherever it has that."""
    for part in ("text_config", "llm_config"):
        if isinstance(config.get(part), dict) and key in config[part]:
            return {**config, part: {**config[part], key: channels}}
    return {**config, key: channels}
