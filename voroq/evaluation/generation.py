"""Text from a model: a continuation, a reply in a conversation, or documents out of nothing."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from voroq.errors import VoroqError
from voroq.evaluation.models import max_positions
from voroq.integrations.cache import PyramidCache
from voroq.integrations.compat import cache_argument
from voroq.packed.files import write_text

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
    with _sampling(model, seed):
        out = model.generate(
            tokens.to(model.device),
            attention_mask=torch.ones_like(tokens, device=model.device),
            max_new_tokens=max_new_tokens,
            streamer=None if hear is None else _Listener(tokenizer, hear),
            **sampling,
        )[0, tokens.shape[1] :]
    return Generation(tokenizer.decode(out, skip_special_tokens=True), out.shape[0], time.perf_counter() - start)


def documents(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    tokens: int,
    begin: str = "bos",
    batch: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[list[str]]:
    """`count` texts that `model` writes from one token on, `batch` of them at a time, at most `tokens` more each: what it was trained on,
    as far as it remembers. `begin` "bos" is after the tokenizer's BOS (EOS where it has none), as texts begin; "anywhere" is with any other
    token of its vocabulary, which is in the middle of texts of every kind. `seed` decides them.

    Whatever the model's own generation config says of sampling is put aside. Raises VoroqError for numbers out of range, for more
    tokens than positions and for a tokenizer without a token to begin after.
    """
    if min(count, tokens, batch) < 1 or not 0 < temperature <= 10:
        raise VoroqError(
            f"{count} documents of {tokens} tokens, {batch} at a time, at temperature {temperature:g}: "
            "give at least 1 of each and a temperature above 0, at most 10"
        )
    limit = max_positions(model)
    if limit is not None and tokens >= limit:
        raise VoroqError(f"{tokens} tokens and the one before them exceed the model's {limit} positions: give --tokens {limit - 1} or less")
    rng = torch.Generator().manual_seed(seed)
    firsts = _first_tokens(tokenizer, begin)[:, None]
    plain = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1}
    padding = tokenizer.all_special_ids[0] if tokenizer.all_special_ids else int(firsts[0])
    for start in range(0, count, batch):
        begun = firsts[torch.randint(len(firsts), (min(batch, count - start),), generator=rng)].to(model.device)
        with _sampling(model, int(torch.randint(2**62, (1,), generator=rng))):
            out = model.generate(begun, attention_mask=torch.ones_like(begun), max_new_tokens=tokens, pad_token_id=padding, **plain)
        yield tokenizer.batch_decode(out, skip_special_tokens=True)


def write_documents(path: Path, texts: Iterable[str]) -> None:
    """A .jsonl file, a text a row, written whole or not at all."""
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def can_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is a token that texts begin with."""
    return tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None


def _first_tokens(tokenizer: PreTrainedTokenizerBase, begin: str) -> Int[Tensor, "n"]:
    """The tokens of which each document begins with one (see `documents`)."""
    if begin == "anywhere":
        return torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    if begin != "bos":
        raise VoroqError(f"begin {begin!r} is unknown: choose bos or anywhere")
    if not can_begin(tokenizer):
        raise VoroqError("the tokenizer has neither a BOS nor an EOS token to begin after: give --begin anywhere")
    return torch.tensor([tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id])


@contextmanager
def _sampling(model: nn.Module, seed: int) -> Iterator[None]:
    """No gradients, and random numbers that `seed` decides; the global random state is as it was afterwards."""
    cuda = [model.device.index or 0] if model.device.type == "cuda" else []
    no_gradients = torch.no_grad() if cuda else torch.inference_mode()  # which hides changes of inputs (integrations/siblings.py)
    with torch.random.fork_rng(devices=cuda), no_gradients:
        torch.manual_seed(seed)
        yield
