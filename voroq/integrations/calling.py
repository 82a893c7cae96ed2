"""How we call transformers: which class opens a folder, without its progress bars and reports, its errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def model_class(config: dict[str, Any]) -> Any:
    """The class that was saved, or a causal language model where transformers has no class of that name (remote code)."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else ""
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else AutoModelForCausalLM


def first_line(error: Exception) -> str:
    """An error of transformers as one line that fits into a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]:.300}" if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or load reports from transformers: what is wrong is raised, not logged."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
