"""`voroq generate` and `voroq chat`: text out of a model."""

import json
import sys
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Annotated, Any

import typer

from voroq.cli import options
from voroq.cli.console import emit, err, error_line
from voroq.errors import VoroqError


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _cache(model: Any, bits: float | None, recent: int) -> Any:
    """An empty cache of so many bits for one text, None for transformers' own."""
    if bits is None:
        return None
    from voroq.integrations.cache import PyramidCache

    return PyramidCache(model.config, bits, recent=recent)


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The beginning of the text.", show_default=False)],
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.8,
    seed: options.Seed = 0,
    cache_bits: options.CacheBits = None,
    cache_recent: options.CacheRecent = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Continue PROMPT.

    [bold]Examples[/]

      voroq generate out "The old man looked at the sea and"

      voroq generate out "Once" --temperature 0 --max-new-tokens 200 --json

      voroq generate out "Once" --cache-bits 3
    """
    from voroq.evaluation import generation
    from voroq.evaluation.models import open_model
    from voroq.integrations.decoder import speed_up

    opened, tokenizer = open_model(model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    speed_up(opened)
    tokens = generation.prompt_tokens(tokenizer, prompt)
    pieces = chain([prompt], repeat(""))  # the prompt goes before the first piece, and nowhere if generating is refused
    result = generation.generate(
        opened,
        tokenizer,
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        cache=_cache(opened, cache_bits, cache_recent),
        hear=None if as_json else lambda text: _say(next(pieces) + text),
    )
    if not as_json:
        _say("\n")
    emit({"model": model, "prompt": prompt, "text": result.text, "tokens": result.tokens, "seconds": result.seconds}, as_json)


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Instructions before the conversation.", show_default=False)] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.7,
    seed: options.Seed = 0,
    cache_bits: options.CacheBits = None,
    cache_recent: options.CacheRecent = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Talk with MODEL: one line in, one reply out. /reset starts over, /quit or end of input leaves.

    The tokenizer's chat template shapes the conversation; a model without one simply continues the text so far.
    With --json each reply is one line of JSON.

    [bold]Examples[/]

      voroq chat out

      echo "What is a lattice?" | voroq chat out --json
    """
    from voroq.evaluation import generation
    from voroq.evaluation.models import open_model
    from voroq.integrations.decoder import speed_up

    opened, tokenizer = open_model(model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    speed_up(opened)
    if tokenizer.chat_template is None:
        err().print("this tokenizer has no chat template: the model continues your text", markup=False)
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    for turn, line in enumerate(_lines(prompt=not as_json)):
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(beginning)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            tokens = generation.conversation_tokens(tokenizer, asked)
            result = generation.generate(
                opened,
                tokenizer,
                tokens,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed + turn,
                cache=_cache(opened, cache_bits, cache_recent),
                hear=None if as_json else _say,
            )
        except VoroqError as error:
            if not sys.stdin.isatty():
                raise
            error_line(f"{error}; /reset starts over")
            continue
        messages = [*asked, {"role": "assistant", "content": result.text}]
        reply = {"role": "assistant", "content": result.text, "tokens": result.tokens}
        _say(json.dumps(reply, ensure_ascii=False) + "\n" if as_json else "\n")


def _lines(*, prompt: bool) -> Iterator[str]:
    """Lines of stdin that say something; a prompt is shown on stderr where someone types."""
    while True:
        if prompt and sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
