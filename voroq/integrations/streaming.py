"""Quantizing while transformers loads: every linear is quantized when its weight arrives, and the weight goes.

transformers fills a model parameter by parameter. Where `param_needs_quantization` says so, it hands the tensor to an operation and
leaves the model to it; ours puts a `QuantLinear` in the place of the `nn.Linear`. So there is one weight in full at a time (of stacked
experts: one stack). Afterwards the model is what `from_pretrained` makes of a folder of ours, and saves as one.

How a weight is quantized is told from outside, by the config's `making`: this wing knows no methods (`voroq/streaming.py` knows both).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from voroq.errors import FormatError, VoroqError
from voroq.experts import unstack_experts
from voroq.integrations.transformers import VoroqConfig, VoroqQuantizer, _check_all_loaded, quant_linears
from voroq.layer import QuantLinear
from voroq.packed.base import Packed
from voroq.packed.checkpoint import quantization_config
from voroq.shapes import Matrix

STREAMING = "voroq_streaming"
"""The `quant_method` of a model that is to be quantized while it is loaded."""
Make = Callable[[Matrix, torch.dtype], Packed]
"""A weight [out in] and the dtype that its scales are stored in -> the packed linear."""
Making = Callable[[nn.Module], Mapping[str, Make]]
"""A model on meta -> what to do with every linear that is to be quantized, by its name (experts unstacked)."""


class StreamingQuantizer(HfQuantizer):
    """Makes `QuantLinear`s of the weights of a plain checkpoint. The config has a `making` (see `Making`)."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.makes: dict[str, Make] = {}
        self.arriving: dict[str, list[str]] = {}
        self.stacks: dict[str, nn.Module] = {}
        self.failure: VoroqError | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise VoroqError("a model cannot be quantized while parts of it are offloaded to disk; leave disk out of device_map")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.arriving

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        with torch.device("cpu"):  # loading happens under the meta device, telling a stack of experts takes a small computation
            self.makes = dict(self.quantization_config.making(model))
        for name in self.makes:
            self.arriving.setdefault(_parameter(model, name), []).append(name)

    def arrived(self, model: nn.Module, parameter: str, weight: torch.Tensor) -> None:
        """Quantize what came for `parameter` and put the layers in place."""
        sites = self.arriving[parameter]
        owner, _, local = parameter.rpartition(".")
        if local != "weight" and owner not in self.stacks:
            with torch.device("cpu"):
                self.stacks[owner] = model.get_submodule(owner)
                model.set_submodule(owner, unstack_experts(self.stacks[owner]))
        for name, w in zip(sites, [weight] if local == "weight" else weight, strict=True):
            linear = model.get_submodule(name)
            layer = QuantLinear.holding(self.makes[name](w, linear.weight.dtype))
            layer.bias = linear.bias  # it may be there already, or come later
            for stored in layer.packed().tensors.values():
                stored._is_hf_initialized = True
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.failure is not None:
            raise self.failure
        layers = quant_linears(model)
        missing = next((name for name in self.makes if name not in layers), None)
        if missing is not None:
            raise FormatError(f"tensor {missing}.weight is missing from the model's files; download the model again")
        _check_all_loaded(model)
        for layer in layers.values():
            layer.requires_grad_(False)
        biased = {name for name, layer in layers.items() if layer.bias is not None}
        config = VoroqConfig(**quantization_config("voroq", {name: layer.spec for name, layer in layers.items()}, biased))
        model.config.quantization_config = config
        model.quantization_method = config.quant_method
        model.hf_quantizer = VoroqQuantizer(config)  # from here on the model is one that was quantized already
        model.hf_quantizer.stacks = self.stacks
        model._weight_conversions = []  # saved under the names that the config uses, not those of the checkpoint that was read


class _Quantize(ConversionOps):
    """The step of transformers' loader that gets the weights."""

    def __init__(self, quantizer: StreamingQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Take the weights that are to be quantized out of `input_dict`, and return the rest.

        transformers turns what is raised here into a page of log; the first complaint is kept, and raised when loading ends.
        """
        rest = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if name not in self.quantizer.arriving:
                rest[name] = value
            elif self.quantizer.failure is None:
                try:
                    self.quantizer.arrived(model, name, tensor)
                except VoroqError as error:
                    self.quantizer.failure = error
                else:
                    (missing_keys if missing_keys is not None else set()).discard(name)
        return rest


def _parameter(model: nn.Module, name: str) -> str:
    """The parameter of `model` in which the weight of linear `name` arrives: its own, or the stack of experts it is part of."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            module = model.get_submodule(".".join(parts[:cut]))
        except AttributeError:
            continue
        return f"{name}.weight" if isinstance(module, nn.Linear) else f"{'.'.join(parts[:cut])}.{parts[-1]}"
    raise VoroqError(f"{type(model).__name__} has no linear {name}")


def register(config: type) -> None:
    """Make transformers quantize while loading for this class of config. Doing it again changes nothing."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[STREAMING] = config
    auto.AUTO_QUANTIZER_MAPPING[STREAMING] = StreamingQuantizer
