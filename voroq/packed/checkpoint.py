"""Quantized model folders: their config, their tensors, and the checks that transformers does not make.

    quantization_config(layout, specs)  ->  config.json  ->  specs_from_config(...).lookup(module)

A folder is checked in two steps: `check_listing` compares names, dtypes and shapes in the file headers with what the specs
announce (nothing is read), `check_packed` looks at the values of one linear.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voroq.errors import FormatError
from voroq.packed import gptqmodel
from voroq.packed.base import FLOATS, MAX_NAME, Fields, Packed, Role, Spec, Stored, from_int16, is_name
from voroq.packed.format import spec_from_json, spec_type
from voroq.packed.shards import TensorInfo, read_json, tensors_in

VERSION = 1
"""Of the native layout."""

_MARKS = {"vptq": ".centroids.weight", "voroq": ".weight_codes"}
"""The tensor that every quantized linear has."""


def quantization_config(layout: str, specs: Mapping[str, Spec], biased: Collection[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of config.json. `biased` names the modules whose linear has a bias."""
    spec_type(layout)
    layers = {name: spec.to_json(bias=name in biased) for name, spec in specs.items()}
    if layout == "vptq":
        return {"quant_method": layout, "config_for_layers": layers}
    return {"quant_method": layout, "version": VERSION, "layers": layers}


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The `quantization_config` of a config.json, None if there is none.

    It may lie inside the config of a multimodal model's text part. The first VPTQ models (package 0.0.3 and before) have a top-level
    `quant_config` instead, the entry of each linear by its full name; another `quant_config` than theirs is none of ours.
    """
    found = next((part["quantization_config"] for part in _parts(config) if part.get("quantization_config") is not None), None)
    entries = config.get("quant_config")
    if found is None and isinstance(entries, dict) and any(isinstance(e, dict) and "vector_lens" in e for e in entries.values()):
        return {"quant_method": "vptq", "config_for_layers": entries}
    return found


def with_quantization_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with a quantization of ours at its top, where transformers finds it; `config` itself where that changes nothing.

    transformers also looks into `text_config`, so nothing is moved from there.
    """
    found, parts = quantization_of(config), _parts(config, "text_config")
    ours = isinstance(found, dict) and found.get("quant_method") in tuple(_MARKS)
    if not ours or any(part.get("quantization_config") for part in parts):
        return config
    return {name: value for name, value in config.items() if name != "quant_config"} | {"quantization_config": found}


def _parts(config: Mapping[str, Any], *names: str) -> list[Mapping[str, Any]]:
    """A config and those of its parts `names` (text_config and llm_config if none are given) that are there."""
    return [config, *(config[name] for name in names or ("text_config", "llm_config") if isinstance(config.get(name), dict))]


@dataclass(frozen=True)
class SpecTable:
    """Which module is stored how. `shared` holds entries for all modules whose last name component is the key, but `skipped`.

    `blanket` is the one entry for whatever the files store quantized; `naming` says what that is.
    """

    method: str
    layers: Mapping[str, Any] = field(repr=False)
    shared: Mapping[str, Any] = field(repr=False)
    skipped: tuple[str, ...] = ()
    blanket: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The modules named in full."""
        return tuple(self.layers)

    def stored(self, tensors: Iterable[str]) -> list[str]:
        """The modules that `tensors` (names) store quantized."""
        mark = _MARKS[self.method]
        return [name.removesuffix(mark) for name in tensors if name.endswith(mark)]

    def naming(self, tensors: Iterable[str]) -> "SpecTable":
        """The table of a folder with these tensors: a blanket entry becomes one for each linear that is there."""
        return self if self.blanket is None else replace(self, layers=dict.fromkeys(self.stored(tensors), self.blanket))

    def lookup(self, module: str, shape: tuple[int, int] | None = None) -> Spec | None:
        """The spec of `module` by its full name, else by its last component; None when it is not quantized.

        `shape` (out, in) of the model's linear, if known, must agree. Raises FormatError naming module and field.
        """
        entry = self.entry(module)
        if entry is None:
            return None
        label = module if module in self.layers else f"{module} (shared entry {_tail(module)})"
        data = gptqmodel.layer(entry, module, shape) if self.blanket is not None else entry
        return spec_from_json(self.method, data, label, shape)

    def entry(self, module: str) -> Any:
        """What the config has to say about `module`, None if nothing."""
        if module in self.layers:
            return self.layers[module]
        skipped = any(f".{skip}." in f".{module}." for skip in self.skipped)
        return None if skipped else self.shared.get(_tail(module))

    def lacks_shape(self, module: str) -> bool:
        """Whether the entry of `module` leaves the shape to the model."""
        entry = self.entry(module)
        return isinstance(entry, dict) and not {"in_features", "shape"} & set(entry)


def specs_from_config(config: Any) -> SpecTable:
    """The table of a `quantization_config`. Raises FormatError naming module and field for anything out of bounds."""
    fields = Fields(config, "the model")
    method = fields.choice("quant_method", ("vptq", "voroq"))
    if gptqmodel.is_blanket(config):
        gptqmodel.check_blanket(config)
        return SpecTable(method, {}, {}, (), config)
    if method == "vptq":
        fields.only("quant_method", "config_for_layers", "shared_layer_config", "enable_proxy_error", "modules_to_not_convert")
        if config.get("enable_proxy_error") not in (None, False):
            raise fields.fail("enable_proxy_error", "false")
        layers, shared = (_layers(fields, name, required=False) for name in ("config_for_layers", "shared_layer_config"))
        if not layers and not shared:
            raise fields.fail("config_for_layers", "an object with an entry for each quantized module")
        dotted = next((name for name in shared if "." in name), None)
        if dotted is not None:
            raise fields.fail("shared_layer_config", f"an object of last parts of names; {dotted!r:.60} has a dot, so it never applies")
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
    """A model folder as its config and file headers describe it. `specs` is None for a model that is not quantized.

    `shapes` are (out, in) of linears by their names on disk, where the model had to be asked.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    specs: SpecTable | None = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def names(self) -> list[str]:
        """Every quantized module: those named in full, and those of shared entries that have tensors."""
        if self.specs is None:
            return []
        shared = [name for name in self.specs.stored(self.tensors) if name not in self.specs.layers] if self.specs.shared else []
        return [*self.specs.names, *(name for name in shared if self.specs.entry(name) is not None)]

    def spec(self, module: str) -> Spec:
        """The spec of one quantized module."""
        spec = self.specs.lookup(module, self.shapes.get(module)) if self.specs else None
        if spec is None:
            raise FormatError(f"{self.path}: {module} is not quantized")
        return spec

    def sites(self) -> dict[str, Spec]:
        """Every quantized module and its spec. Raises FormatError where config and files disagree about what is quantized."""
        for problem in self.uncovered():
            raise FormatError(problem)
        return {name: self.spec(name) for name in self.names()}

    def uncovered(self) -> list[str]:
        """Linears that are stored quantized and have no entry, shared entries that apply to nothing."""
        return [] if self.specs is None else coverage_defects(self.specs, self.specs.stored(self.tensors))

    def packed(self, module: str) -> Packed:
        """One linear, read and checked. Raises FormatError naming what is wrong."""
        spec = self.spec(module)
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
    return described(path, read_json(path / "config.json"), tensors_in(path))


def described(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> Folder:
    """The folder of a config and file headers that were read. Raises FormatError naming module and field."""
    quantization = quantization_of(config)
    if quantization is not None:
        return Folder(path, config, specs_from_config(quantization).naming(tensors), tensors)
    for name in tensors:
        owner = next((name.removesuffix(mark) for mark in _MARKS.values() if name.endswith(mark)), None)
        if owner is not None and {f"{owner}.indices", f"{owner}.weight_codes"} & tensors.keys():
            raise FormatError(f"{owner} is stored quantized ({name}), but the config has no quantization_config; re-download config.json")
    return Folder(path, config, None, tensors)


def read_packed(folder: str | Path, module: str) -> Packed:
    """One linear of a model folder, checked."""
    return open_folder(folder).packed(module)


def coverage_defects(table: SpecTable, stored: Collection[str]) -> list[str]:
    """What is wrong with a config for files that store the modules `stored` quantized."""
    mark, missing = _MARKS[table.method], [name for name in stored if table.entry(name) is None]
    tails = {_tail(name) for name in stored if name not in table.layers}
    unused = [key for key in table.shared if key not in tails and key not in {_tail(name) for name in table.layers}]
    return [
        *(f"{name} is stored quantized ({name}{mark}), but the quantization config has no entry for it" for name in missing),
        *(f"shared_layer_config has an entry {key!r:.60}, but no quantized linear of the model is called so" for key in unused),
    ]


def check_listing(specs: Mapping[str, Spec], found: Mapping[str, TensorInfo], biased: Collection[str] | None = None) -> None:
    """Every tensor of the quantized modules is there with the right dtype and shape, and none that does not belong.

    `biased` names the modules that have a bias (None: a bias is optional). Raises FormatError naming the tensor.
    """
    for problem in listing_defects(specs, found, biased):
        raise FormatError(problem)


def listing_defects(specs: Mapping[str, Spec], found: Mapping[str, TensorInfo], biased: Collection[str] | None = None) -> Iterator[str]:
    """What `check_listing` complains about, all of it."""
    for module, spec in specs.items():
        expected = list(spec.layout())
        if biased is not None and module in biased:
            expected.append(Stored("bias", (spec.shape[0],), Role.SCALE, FLOATS))
        for stored in expected:
            name = f"{module}.{stored.name}"
            if name not in found:
                yield f"tensor {name} is missing; re-download the model, or quantize again"
            else:
                yield from _type_defects(f"{found[name].file}: tensor {name}", stored, found[name].dtype, found[name].shape)
    for name, info in found.items():
        owner, local = _owner(name, specs)
        if owner is None or local in {stored.name for stored in specs[owner].layout()}:
            continue
        if local != "bias" or (biased is not None and owner not in biased):
            yield f"{info.file}: tensor {name} does not belong to a quantized linear; quantize into a fresh folder"


def check_packed(module: str, packed: Packed) -> None:
    """The values of one linear: dtypes, shapes, codes inside their tables, finite numbers, a permutation that is one.

    Raises FormatError naming the tensor and the problem.
    """
    for problem in packed_defects(module, packed):
        raise FormatError(problem)


def packed_defects(module: str, packed: Packed) -> Iterator[str]:
    """What `check_packed` complains about, all of it."""
    expected = {stored.name: stored for stored in packed.spec.layout()}
    for name in dict.fromkeys([*expected, *packed.tensors]):
        if name not in expected or name not in packed.tensors:
            yield f"tensor {module}.{name} is {'missing' if name in expected else 'unexpected'}"
            continue
        stored, tensor = expected[name], packed.tensors[name]
        wrong = list(_type_defects(f"tensor {module}.{name}", stored, tensor.dtype, tuple(tensor.shape)))
        yield from wrong or value_defects(f"tensor {module}.{name}", stored, tensor)


def value_defects(where: str, stored: Stored, tensor: Tensor) -> Iterator[str]:
    """What is wrong with the numbers of one tensor that has the right dtype and shape."""
    if stored.real and not _all_finite(tensor):
        yield f"{where} holds NaN or infinity; re-download the model, or quantize again"
    if stored.limit is not None and tensor.numel():
        low, high = (int(code) for code in from_int16(tensor).aminmax())
        if low < 0 or high >= stored.limit:
            yield f"{where} holds code {low if low < 0 else high}, its table has {stored.limit} entries"
    if stored.role is Role.PERM and not _is_permutation(from_int16(tensor)):
        yield f"{where} is not a permutation of 0 to {tensor.numel() - 1}"


def _all_finite(tensor: Tensor) -> bool:
    """The extremes say it, NaN being both; a tenth of the time of asking every number."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _is_permutation(order: Tensor) -> bool:
    count = order.numel()
    low, high = torch.aminmax(order)
    seen = torch.zeros(count, dtype=torch.bool, device=order.device)
    return int(low) >= 0 and int(high) < count and bool(seen.index_fill_(0, order, True).all())


def _type_defects(where: str, stored: Stored, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[str]:
    if dtype not in stored.dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in stored.dtypes)
        yield f"{where} is {str(dtype).removeprefix('torch.')}, {names} is needed"
    elif shape != stored.shape:
        yield f"{where} has shape {list(shape)}, {list(stored.shape)} is needed"


def _owner(name: str, specs: Mapping[str, Spec]) -> tuple[str | None, str]:
    """The quantized module that tensor `name` lies in, and its name there."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if module in specs:
            return module, ".".join(parts[cut:])
    return None, name


def _tail(module: str) -> str:
    return module.rsplit(".", 1)[-1]
