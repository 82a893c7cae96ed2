"""Loading quantized folders with transformers: `AutoModelForCausalLM.from_pretrained(folder)` after `import voroq`.

transformers builds the model on the meta device and asks the quantizer to change it before weights arrive. Here every linear
that the config names becomes a `QuantLinear`; names, dtypes and shapes in the files are compared with what those layers
expect before anything is read, and values are checked after. For `quant_method: "vptq"` this replaces the loader that ships
with transformers, which needs CUDA and the `vptq` package and fails on every model (it looks up a dotted name as a child).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from voroq.errors import FormatError
from voroq.integrations.compat import came_from_checkpoint, names_in_model
from voroq.integrations.places import is_saved_class, sites_in
from voroq.layer import QuantLinear
from voroq.packed.base import MAX_SIDE, Packed
from voroq.packed.checkpoint import SpecTable, check_listing, check_packed, coverage_defects, quantization_config, specs_from_config
from voroq.packed.expand import can_expand, expanded
from voroq.packed.legacy import modern
from voroq.packed.shards import TensorInfo, read_header


class VoroqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a folder, kept field by field as it is on disk, so that saving loses nothing.

    Linears of older layouts become current ones while loading, and the config with them.
    """

    def __init__(self, quant_method: str, **fields: Any) -> None:
        self.quant_method = quant_method
        self.__dict__.update(fields)
        self.specs()

    def specs(self) -> SpecTable:
        """Raises FormatError naming module and field for anything out of bounds."""
        return specs_from_config(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields; their values are shared, for nobody changes them in place, and a large model has hundreds of entries."""
        return dict(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VoroqConfig":
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        return copy

    def become(self, config: dict[str, Any]) -> None:
        self.__dict__.clear()
        self.__dict__.update(config)


class VoroqQuantizer(HfQuantizer):
    """Swaps linears for `QuantLinear`s. Only for folders that are quantized already: `voroq.quantize_model` makes them."""

    requires_calibration = True

    def __init__(self, quantization_config: VoroqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.table = quantization_config.specs()
        self.stacks: dict[str, nn.Module] = {}
        self.names: dict[str, str] = {}
        self.listing: dict[str, TensorInfo] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained (`voroq.lora`); codes and tables stay."""
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        infos = _headers(checkpoint_files or [])
        if infos:
            _check_stacks(model, infos)
        self.table = self.table.naming(infos)
        for problem in coverage_defects(self.table, self.table.stored(infos)) if infos else ():
            raise FormatError(problem)
        for place, (name, spec) in sites_in(model, self.table, self.stacks).items():
            linear = model.get_submodule(place)
            self.names[place] = name
            self.dtypes[place] = linear.weight.dtype
            model.set_submodule(place, QuantLinear(spec, bias=linear.bias is not None, dtype=linear.weight.dtype, device="meta"))
        self.listing = {place: infos[name] for name, place in names_in_model(model, infos).items()}
        if self.listing:
            _check_reals(model, self.listing)
            layers = quant_linears(model)
            biased = {name for name, layer in layers.items() if layer.bias is not None}
            check_listing({name: layer.spec for name, layer in layers.items()}, self.listing, biased)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        _check_all_loaded(model)
        changed = self.table.blanket is not None
        for name, layer in quant_linears(model).items():
            packed = layer.packed()
            if any(tensor.is_meta for tensor in packed.tensors.values()):  # offloaded: look at the file, and leave the layer as it is
                check_packed(name, Packed(packed.spec, {local: self.listing[f"{name}.{local}"].load() for local in packed.tensors}))
            else:
                check_packed(name, packed)
                changed |= modern(packed).spec is not packed.spec
                layer.become(modern(packed))
            layer.requires_grad_(False)
            codes = {stored.name for stored in layer.spec.layout() if not stored.real}
            for local, parameter in layer.named_parameters():  # older releases keep the file's type for tensors that they rename
                if local not in codes and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.dtypes[name])
        if changed:
            self._renew_config(model)

    def expand(self, model: nn.Module) -> None:
        """Spell the pyramids of `model`, loaded, out as integers: more memory, less time a product, the same weights."""
        for layer in quant_linears(model).values():
            if can_expand(layer.spec):
                layer.become(expanded(layer.packed()))
        self._renew_config(model)

    def _renew_config(self, model: nn.Module) -> None:
        """Describe the layers as they are now, so that saving writes what is there."""
        layers = {self.names[place]: layer for place, layer in quant_linears(model).items()}
        biased = {name for name, layer in layers.items() if layer.bias is not None}
        specs = {name: layer.spec for name, layer in layers.items()}
        self.quantization_config.become(quantization_config(self.table.method, specs, biased))
        text = model.config.get_text_config(decoder=True)
        if text is not model.config and hasattr(text, "quantization_config"):
            del text.quantization_config

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in quant_linears(model).items():
            model.set_submodule(name, layer.dequantize(dtype))
        for name, stack in self.stacks.items():
            model.set_submodule(name, _restack(stack, model.get_submodule(name)))
        return model


def register() -> None:
    """Make transformers load both methods with us. Doing it again changes nothing."""
    for method in ("vptq", "voroq"):
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = VoroqConfig
        auto.AUTO_QUANTIZER_MAPPING[method] = VoroqQuantizer


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def _headers(files: list[str]) -> dict[str, TensorInfo]:
    """The tensors in `files`. Raises FormatError for files that are damaged or no safetensors."""
    infos: dict[str, TensorInfo] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise FormatError(f"{file}: only safetensors files are read; convert the model first")
        infos |= read_header(Path(file))
    return infos


def _check_stacks(model: nn.Module, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse stacked experts of a size that the files cannot back, before they are told apart and unstacked one by one."""
    most = max(len(infos), *(info.shape[0] for info in infos.values() if info.shape), 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and (parameter.shape[0] > most or max(parameter.shape) > MAX_SIDE):
            shape = list(parameter.shape)
            raise FormatError(f"the model's config asks for a tensor {name} of shape {shape}, the files have nothing of that size")


def _check_reals(model: nn.Module, listing: dict[str, TensorInfo]) -> None:
    """Integers in the place of real numbers, and (by older transformers) nothing in the place of something, would be loaded as they are."""
    for name, parameter in model.named_parameters():
        info = listing.get(name)
        if info is not None and parameter.is_floating_point() and not info.dtype.is_floating_point:
            raise FormatError(f"{info.file}: tensor {name} is {str(info.dtype).removeprefix('torch.')}, real numbers are needed")
        if info is not None and parameter.numel() and not info.size:
            raise FormatError(f"{info.file}: tensor {name} is empty, shape {list(parameter.shape)} is needed")


def _check_all_loaded(model: nn.Module) -> None:
    """Every parameter came from the files; only a model of another class than the saved one may have a new, untrained head."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    whole, quantized = is_saved_class(model), tuple(f"{name}." for name in quant_linears(model))
    for name, parameter in model.named_parameters():
        if parameter.is_meta or came_from_checkpoint(parameter) or any(pattern.search(name) for pattern in ignored):
            continue
        if whole or name.startswith(quantized):
            raise FormatError(f"tensor {name} is missing from the model's files; re-download the model, or quantize again")


def _restack(stack: nn.Module, experts: nn.Module) -> nn.Module:
    """`stack` (on meta) filled with the dense linears of `experts`."""
    children = [experts.get_submodule(str(index)) for index in range(experts.num_experts)]
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.stack([child.get_submodule(name).weight.detach() for child in children])
        setattr(stack, name, nn.Parameter(weight))
    return stack


register()
