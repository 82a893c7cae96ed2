"""Open any causal model, quantized by us or not, with errors a user can act on."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from voroq.errors import VoroqError
from voroq.integrations.load import load
from voroq.pipeline.source import open_source
from voroq.pipeline.text import default_context

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> str:
    """ "auto" becomes cuda where there is one; raises VoroqError for a device that does not exist."""
    try:
        kind = torch.device("cpu" if device == "auto" else device).type
    except RuntimeError as error:
        raise VoroqError(f"device {device} is unknown: give auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise VoroqError(f"no CUDA device for --device {device}: use --device cpu, or install a torch build for your GPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_dtype(dtype: str, device: str) -> torch.dtype | None:
    """ "auto" is float32 on the CPU (exact and, there, fast) and None, the checkpoint's own, on a GPU (where memory is short)."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else None
    if dtype not in DTYPES:
        raise VoroqError(f"dtype {dtype} is unknown: give auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def open_model(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    expand: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model in eval mode and tokenizer of a local folder or hub id; `expand` as `voroq.load` has it.

    Raises VoroqError for what is missing, gated or damaged.
    """
    device = resolve_device(device)
    found = open_source(source, revision=revision, trust_remote_code=trust_remote_code)
    options = {"dtype": resolve_dtype(dtype, device), "trust_remote_code": trust_remote_code, "expand": expand}
    model, tokenizer = load(found.folder, device=device, **options)
    if model.get_output_embeddings() is None:
        raise VoroqError(f"{source} has no language modelling head (it is a {type(model).__name__}): give a causal language model")
    return model, tokenizer


def context_of(model: nn.Module) -> int:
    """The window length to use with `model` where none is asked for."""
    return default_context(max_positions(model))


def max_positions(model: nn.Module) -> int | None:
    """Positions the model was made for, if its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
