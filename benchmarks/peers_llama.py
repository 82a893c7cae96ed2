"""llama.cpp for `decode_cpu.py`: a Llama of any shape whose weights are random, in ggml's formats, and how fast it reads and writes.

Any bits are codes of some weight, so blocks are filled with random bytes and only their scales are made sane: the time does not depend on
them. Embedding and head stay in bfloat16, as in the models compared with.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

FORMATS = {"BF16": 16.0, "Q4_0": 4.5, "Q2_K": 2.625, "IQ2_XS": 2.3125}
"""Bits per weight of the linears in the blocks."""
SCALES = {"Q4_0": (0, 1), "Q2_K": (80, 2), "IQ2_XS": (0, 1)}
"""Byte of a block where its float16 scales begin, and how many there are (ggml-common.h)."""


def rows(shape, prompt, new, repeats, threads, clock):
    """[format, bits, seconds per prompt token, seconds per new token] of every format, measured in turns; None for one that crashes."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        files = {name: write(Path(folder) / f"{name}.gguf", shape, name) for name in FORMATS}
        models = {name: Model(path, prompt + new, threads, clock) for name, path in files.items() if survives(path)}
        best = {name: [float("inf"), float("inf")] if name in models else [None, None] for name in FORMATS}
        for _ in range(repeats):
            for name, model in models.items():
                best[name] = [min(pair) for pair in zip(best[name], model.speak(shape["vocab_size"], prompt, new), strict=True)]
    return [[name, FORMATS[name], *times] for name, times in best.items()]


def survives(path):
    """Whether a process of its own can run the model: what llama.cpp was compiled for here may be more than the system allows."""
    return subprocess.run([sys.executable, __file__, str(path)], capture_output=True, check=False).returncode == 0


class Model:
    def __init__(self, path, positions, threads, clock):
        self.clock = clock
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_load_model_from_file(str(path).encode(), settings)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = positions, positions, positions
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_new_context_with_model(self.model, context)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp cannot open {path}")

    def speak(self, vocabulary, prompt, new):
        """Seconds per token of a prompt of random tokens, and of the fastest token after it."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens = np.random.default_rng(0).integers(0, vocabulary, prompt + new).tolist()
        took = [self.feed(tokens[:prompt])] + [self.feed([token]) for token in tokens[prompt:]]
        return took[0] / prompt, min(took[1:])

    def feed(self, tokens):
        begun = self.clock()
        held = (llama_cpp.llama_token * len(tokens))(*tokens)  # a batch only points to it
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(held, len(tokens))):
            raise RuntimeError("llama.cpp refused a batch")
        llama_cpp.llama_get_logits(self.context)
        return self.clock() - begun


def write(path, shape, name):
    """A model file; `shape` has the names of transformers' LlamaConfig."""
    hidden, wide, heads, pairs = (shape[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def linear(called, out, columns, form):
        kind = gguf.GGMLQuantizationType[form]
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        if form == "BF16":
            halves = (rng.standard_normal((out, columns), np.float32) * columns**-0.5).view(np.uint32) >> 16
            blocks = halves.astype(np.uint16).view(np.uint8)
        else:
            blocks = rng.integers(0, 256, (out * columns // weights, size), np.uint8)
            first, count = SCALES[form]
            blocks[:, first : first + 2 * count] = np.full(count, 0.01 * columns**-0.5, np.float16).view(np.uint8)
            blocks = blocks.reshape(out, -1)
        writer.add_tensor(f"{called}.weight", blocks, raw_dtype=kind)

    def norm(called):
        writer.add_tensor(f"{called}.weight", np.ones(hidden, np.float32))

    linear("token_embd", shape["vocab_size"], hidden, "BF16")
    linear("output", shape["vocab_size"], hidden, "BF16")
    norm("output_norm")
    narrow = hidden // heads * pairs
    for layer in range(shape["num_hidden_layers"]):
        at = f"blk.{layer}."
        norm(f"{at}attn_norm")
        norm(f"{at}ffn_norm")
        sides = {"attn_q": hidden, "attn_k": narrow, "attn_v": narrow, "attn_output": hidden, "ffn_gate": wide, "ffn_up": wide}
        for called, out in sides.items():
            linear(at + called, out, hidden, name)
        linear(f"{at}ffn_down", hidden, wide, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextlib.contextmanager
def quiet():
    """llama.cpp's log, away from both streams: it is long, and the last line of ours is the answer."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


if __name__ == "__main__":
    with quiet():
        Model(Path(sys.argv[1]), 64, 1, time.perf_counter).speak(64, 32, 2)
