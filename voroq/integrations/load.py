"""The front door: `model, tokenizer = voroq.load(folder_or_id)`.

Whatever is wrong with a folder is found and named before the model computes anything: config and file headers here, tensor
names against the model's skeleton and values after reading in `voroq.integrations.transformers`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from voroq.errors import FormatError, VoroqError
from voroq.integrations.calling import first_line, model_class, quiet
from voroq.integrations.transformers import register
from voroq.packed.checkpoint import Folder, described, quantization_of
from voroq.packed.hub import locate
from voroq.packed.shards import read_ahead, read_json, tensors_in


def load(
    folder_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    expand: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model (in eval mode) and tokenizer of a folder or hub id, quantized by voroq, in the VPTQ format, or not quantized.

    `device`: "auto" takes the GPUs if there are any (and spreads over them), else the CPU. `dtype`: that of everything not
    stored as integers; the checkpoint's own when None. `dequantize` gives dense linears: more memory, less time per token
    where no kernel fits. `expand` spells pyramids out as integers of 4 or 8 bits and a scale for 16: between the two.

    Raises VoroqError when there is no such model or tokenizer, FormatError naming the file or tensor that is damaged.
    """
    register()
    place = _device_map(device)
    path = locate(folder_or_id, trust_remote_code=trust_remote_code)
    folder = check_folder(path)
    read_ahead(sorted({info.file for info in folder.tensors.values()}))
    kind = model_class(folder.config)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as error:  # the tokenizers package raises nothing narrower for a damaged file
            raise VoroqError(f"{folder_or_id} has no tokenizer that transformers can read: {first_line(error)}") from error
        try:
            options = {"dtype": dtype or "auto", "device_map": place, "trust_remote_code": trust_remote_code}
            model = kind.from_pretrained(path, **options)
        except VoroqError:
            raise
        except Exception as error:  # a config that makes no sense fails in transformers with whatever it comes to
            raise VoroqError(f"{folder_or_id} cannot be loaded: {first_line(error)}") from error
    if dequantize and folder.specs is not None:
        model = model.dequantize()
    elif expand and folder.specs is not None:
        model.hf_quantizer.expand(model)
    return model.eval(), tokenizer


def check_folder(path: Path) -> Folder:
    """Config and file headers of a model folder, without reading a tensor.

    Raises VoroqError for a quantization that is not ours, FormatError naming the file that is damaged.
    """
    if not (path / "config.json").is_file():
        raise VoroqError(f"{path} has no config.json; give the folder of a Hugging Face model")
    config = read_json(path / "config.json")
    quantization = quantization_of(config)
    tensors = tensors_in(path)
    _check_depth(path, config, len(tensors))
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and method not in ("vptq", "voroq"):
        raise VoroqError(f"{path} is quantized with {method!r:.60}; voroq loads vptq, voroq and models that are not quantized")
    try:
        return described(path, config, tensors)
    except FormatError as error:
        raise FormatError(f"{path / 'config.json'}: {error}") from error


def _check_depth(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a model of more layers than the files have tensors: building it would take hours before anything is found missing."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in part.items():
            if name.endswith(("layers", "n_layer", "depth")) and type(value) is int and value > tensors:
                raise FormatError(f"{path / 'config.json'}: {name} is {value!r:.60}, the files hold only {tensors} tensors")


def _device_map(device: str) -> Any:
    if device == "auto":
        return "auto" if torch.cuda.is_available() else {"": "cpu"}
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise VoroqError(f"unknown device {device!r}: give auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise VoroqError("no CUDA device was found; use device cpu, or install a torch build for your GPU")
    return {"": device}
