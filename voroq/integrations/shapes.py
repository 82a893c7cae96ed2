"""The model behind a folder, on the meta device: for what config and files alone do not say."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from voroq.errors import FormatError, VoroqError
from voroq.integrations.calling import first_line, model_class, quiet
from voroq.integrations.compat import names_in_model
from voroq.integrations.places import linear_at, place_of
from voroq.integrations.transformers import VoroqConfig, VoroqQuantizer
from voroq.packed.checkpoint import Folder, open_folder, quantization_of


def open_model_folder(path: str | Path) -> Folder:
    """As `open_folder`, with the shapes of the linears whose config leaves them to the model (some shared entries, GPTQModel)."""
    folder = open_folder(path)
    wanted = [name for name in folder.names() if folder.specs.lacks_shape(name)]
    return replace(folder, shapes=linear_shapes(folder, wanted)) if wanted else folder


def linear_shapes(folder: Folder, names: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears that are called `names` on disk. Raises FormatError for one that the model does not have."""
    model, shapes = skeleton(folder), {}
    renamed = _in_model(folder, model, [f"{name}.weight" for name in names])
    for name in names:
        module = linear_at(model, place_of(model, name, renamed[f"{name}.weight"].removesuffix(".weight")), {})
        if not isinstance(module, nn.Linear):
            raise FormatError(f"{folder.path}: {name} is stored quantized, but the model ({type(model).__name__}) has no such linear")
        shapes[name] = tuple(module.weight.shape)
    return shapes


def model_defects(folder: Folder) -> list[str]:
    """What transformers would find wrong when loading: linears that the model lacks, tensors that it misses. Nothing is read."""
    infos = folder.tensors
    try:
        model = skeleton(folder)
        if folder.specs is not None:
            quantizer = VoroqQuantizer(VoroqConfig(**quantization_of(folder.config)))
            quantizer._process_model_before_weight_loading(model, sorted({str(info.file) for info in infos.values()}))
        there = set(_in_model(folder, model, infos).values())
    except VoroqError as error:
        return [str(error)]
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    wanted = {name for name, _ in model.named_parameters()}  # of tied ones, the first
    missing = sorted(name for name in wanted - there if not any(pattern.search(name) for pattern in ignored))
    return [f"tensor {name} of the model is missing; re-download the model" for name in missing]


def _in_model(folder: Folder, model: Any, names: Iterable[str]) -> dict[str, str]:
    try:
        return names_in_model(model, names)
    except Exception as error:  # as below: a config that makes no sense
        raise VoroqError(f"{folder.path / 'config.json'}: transformers cannot name the model's tensors: {first_line(error)}") from error


def skeleton(folder: Folder) -> Any:
    """The model of a folder's config, as if it were not quantized, on meta. Raises VoroqError for a config transformers does not know."""
    try:
        with quiet(), torch.device("meta"):
            kind = model_class(folder.config)
            config = (AutoConfig if kind is AutoModelForCausalLM else kind.config_class).from_pretrained(folder.path)
            for part in (config, config.get_text_config(decoder=True)):
                part.dtype = None  # loading takes that of the weights, whatever the config says
                if hasattr(part, "quantization_config"):
                    del part.quantization_config
            return kind.from_config(config) if kind is AutoModelForCausalLM else kind._from_config(config)
    except Exception as error:  # a config that makes no sense fails in transformers with whatever it comes to
        raise VoroqError(f"{folder.path / 'config.json'}: transformers cannot build the model: {first_line(error)}") from error
