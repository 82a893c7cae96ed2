"""Tiny random models, quantized with random tables, as folders on disk."""

from pathlib import Path

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
from voroq.packed.conftest import random_gptq, random_vptq
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.format import pack

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


def random_linear(out: int, columns: int, seed: int, layout: str):
    if layout == "vptq":
        steps = ("affine", "permute") if seed % 2 else ("affine",)
        return random_vptq(out, columns, seed, v=4, sizes=(16, 4), groups=2, outliers=(4 * (seed % 2), 3, 8), steps=steps)
    return random_gptq(out, columns, seed)


def write_model(path: Path, kind: str, layout: str, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Packed]:
    """A folder as the pipeline writes it: every linear of the blocks quantized, MoE experts one by one."""
    model = unstack_experts(tiny(kind))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    packed = {name: pack(random_linear(*m.weight.shape, i, layout), dtype, layout) for i, (name, m) in enumerate(linears.items())}
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
