"""The tokenizer of a model folder, or one line that says why there is none."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from voroq.errors import VoroqError
from voroq.pipeline.source import Source


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Raises VoroqError where the folder holds none that transformers can read."""
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # transformers raises whatever its tokenizer classes raise
        reason = " ".join(str(error).split())[:160]
        raise VoroqError(
            f"{source.name} has no tokenizer that transformers can read ({reason}); add tokenizer.json to the folder"
        ) from error
