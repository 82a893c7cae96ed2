"""VPTQ folders of GPTQModel 7.x: the same tensors, one config for all linears (`docs/format.md`, 2.6).

Its `quantization_config` says `quant_method: "vptq"` but names no linear and gives no shapes: every linear has the same settings,
the ones that are quantized are those with tensors, and how many columns are outliers and in which group follows from the
number of input features.
"""

from math import ceil
from typing import Any

from voroq.errors import FormatError
from voroq.packed.base import MAX_SIDE, MAX_TABLE, MAX_VECTOR, Fields

_LAYOUT = (
    *("vector_lens", "num_centroids", "num_res_centroids", "npercent", "group_size", "group_num"),
    *("enable_norm", "norm_dim", "enable_perm"),
)
_MAKING = (
    *("kmeans_mode", "kmeans_iters", "kmeans_tol", "kmeans_seed", "block_size", "percdamp"),
    *("bits", "desc_act", "sym", "lm_head", "meta"),
)
_CONSTANT = {
    **{"quant_method": ("vptq",), "method": ("vptq", None), "format": ("vptq", None), "checkpoint_format": ("vptq", None)},
    **{"pack_dtype": ("int32", None), "rotation": (None, ""), "activation": (None,)},
}


def is_blanket(config: Any) -> bool:
    """Whether a `quantization_config` is one entry for every linear, as GPTQModel writes it."""
    return isinstance(config, dict) and config.get("quant_method") == "vptq" and "vector_lens" in config


def check_blanket(config: Any) -> None:
    """Raises FormatError for what this layout does not allow, as far as it can be told without a linear's shape."""
    fields = Fields(config, "the model (GPTQModel)").only(*_LAYOUT, *_MAKING, *_CONSTANT, "dynamic")
    for name, values in _CONSTANT.items():
        if config.get(name) not in values:
            raise fields.fail(name, f"{values[0]!r}")
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict) or any(rule not in (False, {}) for rule in rules.values()):
        raise fields.fail("dynamic", "absent, or a list of modules left out; settings of single linears are not supported")
    given = [name for name in ("group_size", "group_num") if fields.integer(name, -1, MAX_SIDE) != -1]
    if len(given) > 1 or any(config[name] == 0 for name in given):
        raise fields.fail(given[0], "-1, or the only one of group_size and group_num that is positive")
    share = config.get("npercent")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 100:
        raise fields.fail("npercent", "a percentage")


def layer(config: dict[str, Any], module: str, shape: tuple[int, int] | None) -> dict[str, Any]:
    """The LAYER entry of `module`, whose weight has `shape` (out, in), in the current layout.

    Raises FormatError when the columns do not divide into equal groups: GPTQModel pads the last one, the VPTQ layout cannot.
    """
    if shape is None:
        raise FormatError(f"the shape of {module} is needed, GPTQModel's config gives none; voroq.load and voroq convert ask the model")
    fields = Fields(config, module)
    vectors, tables = fields.integers("vector_lens", 2, -1, MAX_VECTOR), fields.integers("num_centroids", 2, -1, MAX_TABLE)
    outliers, size, groups = _groups(config, shape[1], outliers=vectors[0] > 0 and tables[0] > 1 and config["npercent"] > 0)
    if outliers + size * groups != shape[1]:
        raise FormatError(
            f"quantization config of {module}: {shape[1]} columns do not divide into {groups} groups of {size}; "
            f"GPTQModel pads the last group, which the VPTQ layout cannot hold; quantize the original with voroq"
        )
    return {
        "in_features": shape[1],
        "out_features": shape[0],
        "vector_lens": [vectors[0] if outliers else -1, vectors[1]],
        "num_centroids": [tables[0] if outliers else -1, tables[1]],
        "num_res_centroids": config.get("num_res_centroids"),
        "group_num": groups,
        "group_size": size,
        "outlier_size": outliers,
        "enable_norm": config.get("enable_norm"),
        "norm_dim": config.get("norm_dim"),
        "enable_perm": config.get("enable_perm"),
        "is_indice_packed": True,
        "indices_as_float": False,
        "bias": None,
    }


def _groups(config: dict[str, Any], columns: int, *, outliers: bool) -> tuple[int, int, int]:
    """Outlier columns, columns of a group, groups. With a number of groups, outliers take what does not divide."""
    first = min(columns, ceil(config["npercent"] / 100 * columns)) if outliers else 0
    size, groups = config["group_size"], config["group_num"]
    if groups > 0:
        first += (columns - first) % groups if outliers else 0
        return first, ceil((columns - first) / groups), groups
    if size > 0:
        return first, size, ceil((columns - first) / size)
    return first, columns - first, 1
