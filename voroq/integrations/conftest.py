"""Tiny random models, quantized with random tables, as folders on disk."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from voroq.experts import unstack_experts
from voroq.packed.base import Packed
from voroq.packed.checkpoint import quantization_config
from voroq.packed.conftest import GPTQMODEL, random_gptq, random_vptq, rewrite
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.format import pack, unpack
from voroq.packed.legacy import OldSpec
from voroq.quantized import Quantized

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}
QWEN3 = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **QWEN3)),
}


def tiny(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return model.eval()


def write_tokenizer(path: Path) -> None:
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 64)}}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(path)


def random_linear(out: int, columns: int, seed: int, layout: str) -> Quantized:
    if layout == "vptq":
        steps = ("affine", "permute") if seed % 2 else ("affine",)
        return random_vptq(out, columns, seed, v=4, sizes=(16, 4), groups=2, outliers=(4 * (seed % 2), 3, 8), steps=steps)
    return random_gptq(out, columns, seed)


def write_model(
    path: Path,
    kind: str,
    layout: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    linear: Callable[[int, int, int], Quantized] | None = None,
) -> dict[str, Packed]:
    """A folder as the pipeline writes it: every linear of the blocks quantized, MoE experts one by one.

    `linear` makes them, of (out, in, seed).
    """
    linear = linear or partial(random_linear, layout=layout)
    model = unstack_experts(tiny(kind))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    packed = {name: pack(linear(*m.weight.shape, i), dtype, layout) for i, (name, m) in enumerate(linears.items())}
    kept = {name: t.to(dtype) for name, t in model.state_dict().items() if name.removesuffix(".weight") not in packed}
    if model.config.tie_word_embeddings:
        kept.pop("lm_head.weight")
    stored = {f"{name}.{local}": tensor for name, p in packed.items() for local, tensor in p.tensors.items()}
    path.mkdir(exist_ok=True)
    write_safetensors(path / "model.safetensors", [Entry.of(name, tensor) for name, tensor in (kept | stored).items()], {"format": "pt"})
    specs = {name: p.spec for name, p in packed.items()}
    biased = {name for name, m in linears.items() if m.bias is not None}
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    write_json(path / "config.json", config | {"quantization_config": quantization_config(layout, specs, biased)})
    write_tokenizer(path)
    return packed


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def make_old(path: Path, packed: dict[str, Packed], *, unpacked: bool = True, floats: bool = False) -> None:
    """Rewrite the folder in the layout of old writers."""
    config, tensors = config_of(path), {}
    for name, current in packed.items():
        old = OldSpec(current.spec, unpacked, floats)
        tensors |= {f"{name}.{local}": tensor for local, tensor in old.pack(unpack(current), torch.bfloat16).items()}
        entry = config["quantization_config"]["config_for_layers"][name]
        config["quantization_config"]["config_for_layers"][name] = old.to_json(bias=entry["bias"]) | {"enable_proxy_error": False}
    rewrite(path, lambda there: there.update(tensors))
    write_json(path / "config.json", config)


def make_first(path: Path, packed: dict[str, Packed]) -> None:
    """Rewrite the folder in the layout of the first releases."""
    make_old(path, packed, unpacked=False)
    config = config_of(path)
    config["quant_config"] = config.pop("quantization_config")["config_for_layers"]
    write_json(path / "config.json", config)


def write_gptqmodel(path: Path) -> dict[str, Packed]:
    """A folder as GPTQModel writes it, made from the current layout; the linears in the current one."""
    steps, shared = ("affine", "permute"), {"v": 2, "sizes": (8, 4), "groups": 2, "outliers": (2, 3, 4)}
    packed = write_model(path, "qwen2", "vptq")
    linears = {name: random_vptq(*p.spec.shape, seed, steps=steps, **shared) for seed, (name, p) in enumerate(packed.items())}
    made = {name: pack(q, torch.bfloat16, "vptq") for name, q in linears.items()}

    def change(tensors):
        for name in list(tensors):
            owner = next((site for site in packed if name.startswith(f"{site}.") and not name.endswith("proj.bias")), None)
            if owner is not None:
                del tensors[name]
        for name, p in made.items():
            for local, tensor in p.tensors.items():
                tensors[f"{name}.{local}"] = tensor.int() if local in ("perm", "outlier_indices") else tensor

    rewrite(path, change)
    entry = {"vector_lens": [3, 2], "num_centroids": [4, 8], "num_res_centroids": [-1, 4], "npercent": 4.0, "group_num": 2}
    write_json(path / "config.json", config_of(path) | {"quantization_config": GPTQMODEL | entry})
    return made
