"""LoRA adapters (PEFT) on top of quantized linears: y = Q(x) + B(A(dropout(x))) * scaling; Q stays as it is, A and B learn.

PEFT finds the layer for an adapter by the type of its base; `lora` tells a config the types here, by PEFT's own way for layers that
it does not know. A config forgets that when it is saved, so it is told again before an adapter is loaded:

    model = peft.get_peft_model(model, voroq.lora(peft.LoraConfig(target_modules=["q_proj", "v_proj"])))
    model = peft.PeftModel.from_pretrained(model, folder, config=voroq.lora(peft.PeftConfig.from_pretrained(folder)))
"""

from typing import Any

import peft
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.layer import QuantLinear


class LoraQuantLinear(nn.Module, LoraLayer):
    """A `QuantLinear` with adapters. They cannot be merged into its codes."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, config: peft.LoraConfig, r: int, lora_alpha: int, **options: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def resolve_lora_variant(self, *, config: peft.LoraConfig, **options: Any) -> None:
        asked = [name for name in ("use_dora", "use_qalora", "velora_config", "arrow_config") if getattr(config, name, None)]
        if asked:
            raise VoroqError(f"adapters on quantized linears are plain LoRA; leave out {asked[0]}")

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                inner = self._cast_input_dtype(self.lora_dropout[name](x), down.weight.dtype)
                y = y + (up(down(inner)) * self.scaling[name]).to(y.dtype)
        return y

    def merge(self, *args: Any, **options: Any) -> None:
        raise VoroqError("an adapter cannot be merged into codes; keep it beside the model, or dequantize the model first")

    unmerge = merge


def lora(config: Any) -> peft.LoraConfig:
    """`config` itself, now knowing how to adapt quantized linears. Raises VoroqError for a config of another kind."""
    if not isinstance(config, peft.LoraConfig):
        raise VoroqError(f"a peft.LoraConfig is needed, got {type(config).__name__}; other adapters cannot sit on quantized linears")
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config
