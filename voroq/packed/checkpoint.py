"""Quantized model folders: their config, their tensors, and the checks that transformers does not make.

    quantization_config(layout, specs)  ->  config.json  ->  specs_from_config(...).lookup(module)

A folder is checked in two steps: `check_listing` compares names, dtypes and shapes in the file headers with what the specs
announce (nothing is read), `check_packed` looks at the values of one linear.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voroq.errors import FormatError
from voroq.packed.base import FLOATS, MAX_NAME, Fields, Packed, Role, Spec, Stored, from_int16, is_name
from voroq.packed.format import spec_type
from voroq.packed.shards import TensorInfo, read_json, tensors_in

VERSION = 1
"""Of the native layout."""


def quantization_config(layout: str, specs: Mapping[str, Spec], biased: Collection[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of config.json. `biased` names the modules whose linear has a bias."""
    spec_type(layout)
    layers = {name: spec.to_json(bias=name in biased) for name, spec in specs.items()}
    if layout == "vptq":
        return {"quant_method": layout, "config_for_layers": layers}
    return {"quant_method": layout, "version": VERSION, "layers": layers}


@dataclass(frozen=True)
class SpecTable:
    """Which module is stored how. `shared` holds entries for all modules whose last name component is the key, but `skipped`."""

    method: str
    layers: Mapping[str, Any] = field(repr=False)
    shared: Mapping[str, Any] = field(repr=False)
    skipped: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The modules named in full."""
        return tuple(self.layers)

    def lookup(self, module: str, shape: tuple[int, int] | None = None) -> Spec | None:
        """The spec of `module` by its full name, else by its last component; None when it is not quantized.

        `shape` (out, in) of the model's linear, if known, must agree. Raises FormatError naming module and field.
        """
        tail = module.rsplit(".", 1)[-1]
        if module in self.layers:
            return spec_type(self.method).from_json(self.layers[module], module, shape)
        if tail in self.shared and not any(f".{skip}." in f".{module}." for skip in self.skipped):
            return spec_type(self.method).from_json(self.shared[tail], f"{module} (shared entry {tail})", shape)
        return None


def specs_from_config(config: Any) -> SpecTable:
    """The table of a `quantization_config`. Raises FormatError naming module and field for anything out of bounds."""
    fields = Fields(config, "the model")
    method = fields.choice("quant_method", ("vptq", "voroq"))
    if method == "vptq":
        fields.only("quant_method", "config_for_layers", "shared_layer_config", "enable_proxy_error", "modules_to_not_convert")
        if config.get("enable_proxy_error") not in (None, False):
            raise fields.fail("enable_proxy_error", "false")
        layers, shared = (_layers(fields, name, required=False) for name in ("config_for_layers", "shared_layer_config"))
        if not layers and not shared:
            raise fields.fail("config_for_layers", "an object with an entry for each quantized module")
    else:
        fields.only("quant_method", "version", "layers").integer("version", VERSION, VERSION)
        layers, shared = _layers(fields, "layers", required=True), {}
    table = SpecTable(method, layers, shared, tuple(str(name) for name in config.get("modules_to_not_convert") or ()))
    for name, entry in layers.items():
        if not isinstance(entry, dict) or method == "voroq" or "in_features" in entry:
            table.lookup(name)
    return table


def _layers(fields: Fields, name: str, *, required: bool) -> dict[str, Any]:
    value = fields.data.get(name)
    if value is None and not required:
        return {}
    if not isinstance(value, dict):
        raise fields.fail(name, "an object with an entry for each quantized module")
    if not all(map(is_name, value)):
        raise fields.fail(name, f"an object whose names have at most {MAX_NAME} printable characters")
    return value


@dataclass(frozen=True)
class Folder:
    """A model folder as its config and file headers describe it. `specs` is None for a model that is not quantized."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    specs: SpecTable | None = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)

    def sites(self) -> dict[str, Spec]:
        """Every quantized module and its spec; those of shared entries are found by their tensors."""
        if self.specs is None:
            return {}
        names = list(self.specs.names)
        suffix = ".centroids.weight"
        if self.specs.shared:
            modules = (name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix))
            names += [module for module in modules if module not in self.specs.layers]
        sites = {name: self.specs.lookup(name) for name in names}
        return {name: spec for name, spec in sites.items() if spec is not None}

    def packed(self, module: str) -> Packed:
        """One linear, read and checked. Raises FormatError naming what is wrong."""
        spec = self.specs.lookup(module) if self.specs else None
        if spec is None:
            raise FormatError(f"{self.path}: {module} is not quantized")
        check_listing({module: spec}, self._tensors_of(module))
        packed = Packed(spec, {stored.name: self.tensors[f"{module}.{stored.name}"].load() for stored in spec.layout()})
        check_packed(module, packed)
        return packed

    def stored_bytes(self, module: str, spec: Spec) -> int:
        """Bytes of one linear on disk, its bias excepted. Raises FormatError when a tensor is missing or not as announced."""
        check_listing({module: spec}, self._tensors_of(module))
        return sum(self.tensors[f"{module}.{stored.name}"].size for stored in spec.layout())

    def _tensors_of(self, module: str) -> dict[str, TensorInfo]:
        return {name: info for name, info in self.tensors.items() if name.startswith(f"{module}.")}


def open_folder(path: str | Path) -> Folder:
    """Read config and headers of a model folder. Raises FormatError or VoroqError naming the file and the problem."""
    path = Path(path)
    config = read_json(path / "config.json")
    quantization = config.get("quantization_config")
    return Folder(path, config, None if quantization is None else specs_from_config(quantization), tensors_in(path))


def read_packed(folder: str | Path, module: str) -> Packed:
    """One linear of a model folder, checked."""
    return open_folder(folder).packed(module)


def check_listing(specs: Mapping[str, Spec], found: Mapping[str, TensorInfo], biased: Collection[str] | None = None) -> None:
    """Every tensor of the quantized modules is there with the right dtype and shape, and none that does not belong.

    `biased` names the modules that have a bias (None: a bias is optional). Raises FormatError naming the tensor.
    """
    for module, spec in specs.items():
        expected = list(spec.layout())
        if biased is not None and module in biased:
            expected.append(Stored("bias", (spec.shape[0],), Role.SCALE, FLOATS))
        for stored in expected:
            _check_stored(f"{module}.{stored.name}", stored, found)
    for name, info in found.items():
        owner, local = _owner(name, specs)
        if owner is None or local in {stored.name for stored in specs[owner].layout()}:
            continue
        if local != "bias" or (biased is not None and owner not in biased):
            raise FormatError(f"{info.file}: tensor {name} does not belong to a quantized linear; quantize into a fresh folder")


def check_packed(module: str, packed: Packed) -> None:
    """The values of one linear: dtypes, shapes, codes inside their tables, finite numbers, a permutation that is one.

    Raises FormatError naming the tensor and the problem.
    """
    expected = {stored.name: stored for stored in packed.spec.layout()}
    for name in [*expected, *packed.tensors]:
        if name not in expected or name not in packed.tensors:
            raise FormatError(f"tensor {module}.{name} is {'missing' if name in expected else 'unexpected'}")
    for name, stored in expected.items():
        tensor = packed.tensors[name]
        _check_type(f"tensor {module}.{name}", stored, tensor.dtype, tuple(tensor.shape))
        if stored.real and not _all_finite(tensor):
            raise FormatError(f"tensor {module}.{name} holds NaN or infinity; re-download the model, or quantize again")
        if stored.limit is not None and tensor.numel() and int(from_int16(tensor).max()) >= stored.limit:
            raise FormatError(f"tensor {module}.{name} holds code {int(from_int16(tensor).max())}, its table has {stored.limit} entries")
        if stored.role is Role.PERM and not _is_permutation(from_int16(tensor)):
            raise FormatError(f"tensor {module}.{name} is not a permutation of 0 to {tensor.numel() - 1}")


def _all_finite(tensor: Tensor) -> bool:
    """The extremes say it, NaN being both; a tenth of the time of asking every number."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _is_permutation(order: Tensor) -> bool:
    count = order.numel()
    low, high = torch.aminmax(order)
    seen = torch.zeros(count, dtype=torch.bool, device=order.device)
    return int(low) >= 0 and int(high) < count and bool(seen.index_fill_(0, order, True).all())


def _check_stored(name: str, stored: Stored, found: Mapping[str, TensorInfo]) -> None:
    if name not in found:
        raise FormatError(f"tensor {name} is missing; re-download the model, or quantize again")
    _check_type(f"{found[name].file}: tensor {name}", stored, found[name].dtype, found[name].shape)


def _check_type(where: str, stored: Stored, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if dtype not in stored.dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in stored.dtypes)
        raise FormatError(f"{where} is {str(dtype).removeprefix('torch.')}, {names} is needed")
    if shape != stored.shape:
        raise FormatError(f"{where} has shape {list(shape)}, {list(stored.shape)} is needed")


def _owner(name: str, specs: Mapping[str, Spec]) -> tuple[str | None, str]:
    """The quantized module that tensor `name` lies in, and its name there."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if module in specs:
            return module, ".".join(parts[cut:])
    return None, name
