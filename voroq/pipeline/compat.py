"""The one place of the pipeline that touches transformers' internals: building a model without weights, and the way from names
on disk to names in the model.

Checkpoints and models disagree about names: old names are renamed, the experts of a layer are stacked, fused projections are
cut. transformers describes this as a list of conversions per model; we use the same list and operations, but one group of
tensors at a time. Works on transformers 5.16 to 5.x by using only what all of them have.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, dot_natural_key, rename_source_key

from voroq.errors import VoroqError


def build_skeleton(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of the config in `folder`: parameters on meta, buffers real, in evaluation mode, without cache.

    Raises VoroqError if the architecture is unknown or is not one stack of blocks, or if the config is invalid.
    """
    # Third-party code builds a model from a file we do not trust: anything may be raised, and all of it means "bad config".
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not trust_remote_code and "auto_map" in (folder / "config.json").read_text(encoding="utf-8"):
            raise VoroqError(f"{folder} needs code of its own to run; if you trust that code, set trust_remote_code=True") from error
        raise VoroqError(f"{folder / 'config.json'} is not a config this transformers knows: {_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise VoroqError(f"{_architecture(config)} is an encoder-decoder; only decoder-only models and encoders can be quantized")
    if getattr(config, "quantization_config", None) is not None:
        raise VoroqError(f"{folder} is already quantized (config.json has a quantization_config); give the original model")
    for part in (config, config.get_text_config()):
        part.use_cache = False
        part.output_hidden_states = False
        part.output_attentions = False
    try:
        with init_empty_weights(include_buffers=False):
            model = _construct(config, dtype, trust_remote_code)
    except VoroqError:
        raise
    except Exception as error:
        raise VoroqError(f"cannot build {_architecture(config)} from {folder / 'config.json'}: {_line(error)}") from error
    for name, group in _float32(model, dtype):
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._parameters[leaf] = nn.Parameter(group.float(), requires_grad=False)
    return model.requires_grad_(False).eval()


def _construct(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or not config.architectures:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    name = _architecture(config)
    model_class = getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel) or model_class.config_class is not type(config):
        kind, version = type(config).__name__, transformers.__version__
        raise VoroqError(f"transformers {version} has no architecture {name!r} for {kind}; check architectures in config.json")
    return model_class._from_config(config, dtype=dtype)


def _architecture(config: Any) -> str:
    return str(config.architectures[0]) if config.architectures else type(config).__name__


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _float32(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters the model wants in float32 although the rest is `dtype`."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = build_glob_alternation(list(plan))[0]
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if pattern.search(name):
            yield name, parameter


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors on disk that together make one or more tensors of the model. Each group is itself only.

    `sources` are (pattern, name): names with the same pattern are stacked in this order. `shapes` gives each target's shape.
    """

    sources: tuple[tuple[str, str], ...]
    shapes: dict[str, tuple[int, ...]]
    converter: WeightConverter | None = field(repr=False)

    def convert(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Target name -> tensor, in the dtype on disk."""
        return _convert(self.converter, self.sources, next(iter(self.shapes)), model, read)


def plan_groups(model: PreTrainedModel, headers: Mapping[str, Tensor]) -> tuple[list[Group], dict[str, str]]:
    """How tensors on disk (`headers`: name -> tensor on meta) become the model's; and the ones it has no use for, by the name
    they would have had.

    Raises VoroqError if tensors on disk do not fit together.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    collected: dict[str, list[tuple[str | None, str]]] = {}
    unused: dict[str, str] = {}
    # In transformers' own order: conversions may depend on it, and it is what numbers the experts.
    for name in sorted(headers, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            collected.setdefault(target, []).append((pattern, name))
        else:
            unused[name] = target
    groups = []
    for target, sources in collected.items():
        converter = by_pattern[sources[0][0]] if sources[0][0] is not None else None
        if converter is None and len(sources) > 1:
            raise VoroqError(f"tensors {sources[0][1]} and {sources[1][1]} are both {target} of the model; remove one of them")
        pairs = tuple((pattern or name, name) for pattern, name in sources)
        try:
            made = _convert(converter, pairs, target, model, headers.__getitem__)
        except Exception as error:  # an operation of transformers on tensors that do not fit may raise anything
            raise VoroqError(f"cannot make {target} from {pairs[0][1]} and {len(pairs) - 1} more tensors: {_line(error)}") from error
        groups.append(Group(pairs, {name: tuple(tensor.shape) for name, tensor in made.items()}, converter))
    return groups, unused


def _convert(
    converter: WeightConverter | None,
    sources: tuple[tuple[str, str], ...],
    target: str,
    model: PreTrainedModel,
    read: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    if converter is None:
        return {target: read(sources[0][1])}
    converter = copy.deepcopy(converter)
    for pattern, name in sources:
        converter.add_tensor(target, name, pattern, read(name))
    made = converter.convert(target, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter it shares its values with."""
    return dict(model.all_tied_weights_keys)
