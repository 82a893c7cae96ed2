"""Text from a model: a continuation, or a reply in a conversation."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from voroq.errors import VoroqError
from voroq.evaluation.models import max_positions
from voroq.integrations.cache import PyramidCache
from voroq.integrations.compat import cache_argument

# None silences the sampling settings that a model's own generation config may hold
BEST_TOKEN = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Generation:
    """`text` follows the prompt; `tokens` were made in `seconds`."""

    text: str
    tokens: int
    seconds: float


class _Listener(TextStreamer):
    """Hands every finished piece of text to `hear`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hear: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.hear = hear

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.hear(text)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Int[Tensor, "one tok"]:
    """Token ids of a plain prompt, with the special tokens the tokenizer puts in front."""
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if tokens.shape[1] == 0:
        raise VoroqError("the prompt is empty: give at least one word")
    return tokens.long()


def conversation_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Int[Tensor, "one tok"]:
    """Token ids of a conversation [{"role", "content"}], by the tokenizer's chat template; without one, the contents as plain text."""
    if tokenizer.chat_template is None:
        return prompt_tokens(tokenizer, "\n".join(message["content"] for message in messages))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Int[Tensor, "one tok"],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
    cache: PyramidCache | None = None,
    hear: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `tokens`; temperature 0 takes the best token always, otherwise `seed` decides. A new `cache` holds keys and values
    (transformers' own when None). `hear` gets the text piece by piece.

    The global random state is left as it was. Raises VoroqError for numbers out of range and for more tokens than positions.
    """
    if max_new_tokens < 1 or not 0 <= temperature <= 10:
        raise VoroqError(f"{max_new_tokens} new tokens at temperature {temperature:g}: give at least 1 and a temperature from 0 to 10")
    limit = max_positions(model)
    if limit is not None and tokens.shape[1] + max_new_tokens > limit:
        raise VoroqError(
            f"a prompt of {tokens.shape[1]} tokens and {max_new_tokens} new ones exceed the model's {limit} positions: "
            "shorten the prompt or give fewer --max-new-tokens"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else dict(BEST_TOKEN)
    end = model.generation_config.eos_token_id
    if model.generation_config.pad_token_id is None and end is not None:
        sampling["pad_token_id"] = end if isinstance(end, int) else end[0]
    if cache is not None:
        sampling |= cache_argument(model.prepare_inputs_for_generation, cache)
    start = time.perf_counter()
    cuda = [model.device.index or 0] if model.device.type == "cuda" else []
    no_gradients = torch.no_grad() if cuda else torch.inference_mode()  # which hides changes of inputs (integrations/siblings.py)
    with torch.random.fork_rng(devices=cuda), no_gradients:
        torch.manual_seed(seed)
        out = model.generate(
            tokens.to(model.device),
            attention_mask=torch.ones_like(tokens, device=model.device),
            max_new_tokens=max_new_tokens,
            streamer=None if hear is None else _Listener(tokenizer, hear),
            **sampling,
        )[0, tokens.shape[1] :]
    return Generation(tokenizer.decode(out, skip_special_tokens=True), out.shape[0], time.perf_counter() - start)
