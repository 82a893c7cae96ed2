"""Everything that differs between transformers 5.16 and the newest 5.x, found by looking, not by version numbers."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping


def names_in_model(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Where the loader will put each tensor of a checkpoint: name on disk -> name in `model` (unchanged when it has no place).

    transformers renames on loading (old names, a base model's prefix), and so must a check made before loading.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, core_model_loading.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, core_model_loading.WeightConverter)]
    state = model.state_dict()
    place = {}
    for name in names:
        renamed, _ = core_model_loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state:
            renamed, _ = core_model_loading.rename_source_key(name, [], [], model.base_model_prefix, state)
        place[name] = renamed
    return place


def cache_argument(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to a model's `forward` or `prepare_inputs_for_generation`."""
    return {"cache" if "cache" in inspect.signature(function).parameters else "past_key_values": cache}


def came_from_checkpoint(parameter: nn.Parameter) -> bool:
    """Whether the loader filled `parameter`, or will have it tied to one that it filled; otherwise its numbers are made up."""
    return bool(getattr(parameter, "_is_hf_initialized", False))
