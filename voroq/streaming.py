"""Quantize while loading, without calibration: the door between making and living.

    AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=voroq.VoroqConfig(method="pvq", bits=3))

Serving (`integrations`) may not know any method, making may not know layers. This room above both gives the loader a function for every
linear. The linears are those that `voroq.quantize_model` would quantize, and each gets the method with no moments: the Hessian is the
identity. PVQ loses least by that, for it has no table to train.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from voroq.errors import VoroqError
from voroq.integrations import streaming, transformers
from voroq.integrations.streaming import STREAMING, Make
from voroq.methods import Method
from voroq.moments import Moments
from voroq.packed.base import Packed
from voroq.packed.format import pack
from voroq.pipeline.blocks import block_sites, find_blocks
from voroq.pipeline.plan import Budget, Plan, make_plan
from voroq.pipeline.preflight import resolve
from voroq.pipeline.work import generator
from voroq.shapes import Matrix


class VoroqConfig(transformers.VoroqConfig):
    """What `from_pretrained(..., quantization_config=...)` takes. Without `quant_method`: how to quantize while loading.

    `method` is a name (`voroq methods`) with `bits` per weight, everything stored counted, and its options by name; or any `Method`.
    `seed` decides every random choice: the same seed, the same model. With `quant_method` "voroq" or "vptq" it is the description of a
    model that is quantized already, as its config.json has it.
    """

    def __init__(self, quant_method: str = STREAMING, **fields: Any) -> None:
        if quant_method == STREAMING:
            self.quant_method = quant_method
            self._order(**fields)
        else:
            super().__init__(quant_method, **fields)

    def _order(
        self, *, method: str | Method | Plan | Budget = "pvq", bits: float | int | None = None, seed: int = 0, **options: Any
    ) -> None:
        if isinstance(method, str):
            self.plan = make_plan(method, None if bits is None else float(bits), {name: str(value) for name, value in options.items()})
        elif bits is not None or options:
            raise VoroqError(f"bits and options go with the name of a method, not with {method!r}; put them into the object")
        else:
            self.plan = method
        self.asked = {"method": method if isinstance(method, str) else repr(method), "bits": bits, "seed": seed, **options}

    def to_dict(self) -> dict[str, Any]:
        """JSON: the description, or what was asked for."""
        return {"quant_method": STREAMING, **self.asked} if self.quant_method == STREAMING else super().to_dict()

    def making(self, model: nn.Module) -> Mapping[str, Make]:
        """What to do with every linear of `model` (on meta) that is to be quantized, by name. Raises VoroqError as the parts do."""
        name, dtype = find_blocks(model), model.dtype
        sites = [site for index, block in enumerate(model.get_submodule(name)) for site in block_sites(block, f"{name}.{index}")]
        plan = resolve(self.plan, sites, dtype)
        methods = {site.name: plan.method_for(site.name) for site in sites}
        return {name: partial(quantized, name, method, self.asked["seed"]) for name, method in methods.items() if method is not None}


def quantized(name: str, method: Method, seed: int, w: Matrix, dtype: torch.dtype) -> Packed:
    """The weight `w` [out in] of linear `name` by `method` without calibration, in the native layout. Raises VoroqError naming it."""
    w = w.float()
    if not torch.isfinite(w).all():
        raise VoroqError(f"tensor {name}.weight holds NaN or infinity; download the model again")
    try:
        packed = pack(method(w, Moments.empty(w.shape[1], w.device), generator(seed, name)), dtype, "voroq")
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise VoroqError(f"{name}: {error}") from error
    return Packed(packed.spec, {local: tensor.to(w.device).contiguous() for local, tensor in packed.tensors.items()})


streaming.register(VoroqConfig)
