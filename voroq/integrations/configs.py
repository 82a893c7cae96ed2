"""Where transformers reads a config.json: a quantization that lies where it does not look is put where it does.

transformers asks for a quantizer when a config has `quantization_config`, and otherwise starts from random weights. The first VPTQ
models (package 0.0.3 and before) say `quant_config` instead, some multimodal ones say it in their `llm_config`. Every way to a config
object, `AutoConfig` and each config class, passes `PreTrainedConfig.get_config_dict`; what it read is handed on with that one field
moved (`docs/format.md`, 2). A config that is not ours comes back as the object it was.
"""

from functools import wraps
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from voroq.packed.checkpoint import with_quantization_config


def _moving(get_config_dict: Any) -> classmethod:
    read = get_config_dict.__func__

    @wraps(read)
    def reading(cls: type, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, unused = read(cls, *args, **kwargs)
        return with_quantization_config(config), unused

    return classmethod(reading)


PreTrainedConfig.get_config_dict = _moving(PreTrainedConfig.__dict__["get_config_dict"])
