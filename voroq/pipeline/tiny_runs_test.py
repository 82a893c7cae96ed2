"""Whole runs on tiny random models, for the tests beside this file: a tokenizer, a text, a source folder, quick methods."""

import hashlib
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from voroq.methods import GPTQ, PVQ, RTN, VPTQ
from voroq.pipeline.run import quantize_model
from voroq.pipeline.tiny_models_test import CONFIGS, save_tiny

LETTERS = [*string.ascii_letters, *"0123456", "\u0120"]  # the last is a space in byte-level tokenizers
QUICK = {
    "rtn": RTN(bits=4, group_size=16),
    "gptq": GPTQ(bits=3, group_size=20, grid="minmax"),
    "pvq": PVQ(bits=3.0, dim=8, sweeps=0),
    "vptq": VPTQ(vector_length=2, table_bits=4, kmeans_steps=2, rounds=0),
}
REPORT = "voroq_report.json"


def write_tokenizer(folder: Path) -> None:
    """One token per letter, 64 in all. Byte-level pairs without merges: the kind that every architecture's tokenizer class can hold."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "<pad>", *LETTERS])}
    words = Tokenizer(BPE(vocabulary, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def write_text(path: Path, letters: int = 400, seed: int = 0) -> Path:
    chosen = torch.randint(0, len(LETTERS) - 1, (letters,), generator=torch.Generator().manual_seed(seed))
    path.write_text("".join(LETTERS[i] for i in chosen))
    return path


def two_blocks(name: str) -> dict[str, Any]:
    """What to change in a tiny model's config so that it has two blocks: enough to have a first and a last one."""
    kinds = {"layer_types": CONFIGS[name]["layer_types"][:2]} if "layer_types" in CONFIGS[name] else {}
    return {"num_hidden_layers": 2, **kinds}


def tiny_source(folder: Path, name: str = "Llama", **changes: object) -> Path:
    """A source folder with the weights of a model of two blocks, tokenizer and a text `text.txt` (which no run copies)."""
    save_tiny(name, folder, **{**two_blocks(name), **changes})
    write_tokenizer(folder)
    write_text(folder / "text.txt")
    return folder


def quick_run(source: Path, out: Path, method: Any = QUICK["rtn"], **changes: Any) -> dict[str, Any]:
    """Quantize a `tiny_source` on a few windows of its text."""
    settings = {"calibration": source / "text.txt", "samples": 6, "context": 16, "device": "cpu"}
    return quantize_model(source, out, method, **{**settings, **changes})


def content(folder: Path) -> dict[str, str]:
    """Hash of every file of a result by name; the report tells times, so only its presence counts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): "" if path.name == REPORT else hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_a_letter_is_a_token_for_every_tokenizer_class(tmp_path):
    for name in ("Llama", "Qwen2", "Gemma2", "Bert"):
        source = tiny_source(tmp_path / name, name)
        tokens = AutoTokenizer.from_pretrained(source)((source / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
        assert len(tokens) == 400
        assert set(tokens) <= set(range(4, 64))
