"""The front door for making: a run, the model card that tells what came of it, and what becomes of the inputs."""

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from voroq.activations import Activations
from voroq.errors import VoroqError
from voroq.integrations.transformers import quant_linears
from voroq.methods import VPTQ
from voroq.packed.base import Packed
from voroq.packed.checkpoint import quantization_config
from voroq.packed.files import write_json
from voroq.packed.native_format import NativeSpec
from voroq.packed.shards import read_json
from voroq.pipeline import run
from voroq.pipeline.plan import Budget, Plan
from voroq.report.card import write_card


@wraps(run.quantize_model)
def quantize_model(
    source: str | Path, out: str | Path, plan: Any, *, activations: Activations | None = None, **options: Any
) -> dict[str, Any]:
    if activations is not None and _makes_official(plan):
        raise VoroqError("the official VPTQ layout has no place for activations; choose another method, or leave --activation-bits out")
    report = run.quantize_model(source, out, plan, **options)
    if activations is not None:
        write_activations(out, activations)
    write_card(out)
    return report


def write_activations(folder: str | Path, activations: Activations | None) -> None:
    """Write into the config of a native model folder how the inputs of its linears are rounded, or with None that they are not.

    The weights stay as they are. Raises VoroqError for folders of another layout.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    entry = config.get("quantization_config") or {}
    if entry.get("quant_method") != "voroq":
        raise VoroqError(f"{folder} is not in the native layout of voroq, so activations have no place in its config")
    specs = {name: replace(NativeSpec.from_json(data, name), activations=activations) for name, data in entry["layers"].items()}
    write_json(path, {**config, "quantization_config": quantization_config("voroq", specs)})


def round_inputs(model: nn.Module, activations: Activations | None) -> None:
    """From now on `model`, loaded, rounds the inputs of its quantized linears so. Raises VoroqError if it has none in the native layout."""
    layers = quant_linears(model)
    if not layers or not all(isinstance(layer.spec, NativeSpec) for layer in layers.values()):
        raise VoroqError("only linears in the native layout of voroq round their inputs, and this model has others; quantize it with pvq")
    for layer in layers.values():
        packed = layer.packed()
        layer.become(Packed(replace(packed.spec, activations=activations), packed.tensors))


def _makes_official(plan: Any) -> bool:
    if isinstance(plan, Budget):
        return plan.method == "vptq"
    methods = plan.methods() if isinstance(plan, Plan) else (plan,)
    return all(isinstance(method, VPTQ) for method in methods)
