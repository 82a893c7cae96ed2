"""Tiny random models of every architecture the pipeline is tested on, for the tests beside this file."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
_GROUPED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}

CONFIGS = {
    "Llama": {**_GROUPED, "tie_word_embeddings": False},
    "Qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True},
    "Mistral": {**_GROUPED, "sliding_window": 4, "head_dim": 8},
    "Gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "GPTNeoX": {**_SIZES, "intermediate_size": 48, "use_parallel_residual": True},
    "OPT": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": 0},
    "Phi3": {**_GROUPED, "pad_token_id": 0},
    "Mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {
        **_GROUPED,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
    },
    "Bert": {**_SIZES, "intermediate_size": 48},
}
HEADS = {"Bert": "BertForMaskedLM"}


def tiny_model(name: str, **changes: object) -> PreTrainedModel:
    """A random float32 model in evaluation mode; the same one every time."""
    config = getattr(transformers, f"{name}Config")(**{**CONFIGS[name], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))(config)
        # Random biases and norms: zeros and ones would hide a tensor in the wrong place.
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_tiny(name: str, folder: Path, *, shards: str = "1GB", **changes: object) -> PreTrainedModel:
    """`tiny_model` also saved in `folder`, in as many shards as `shards` (bytes per shard) makes."""
    model = tiny_model(name, **changes)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def tiny_tokens(windows: int = 3, context: int = 12) -> torch.Tensor:
    """Token windows [windows ctx]; no padding token."""
    return torch.randint(1, 64, (windows, context), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_models_are_reproducible(name):
    first, second = tiny_model(name).state_dict(), tiny_model(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
