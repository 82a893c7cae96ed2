"""Peak memory of `quantize` grows with the largest block, not with the model: random models of 4, 8 and 16 equal blocks.

Each run is its own process; the resident set's peak is what the operating system reports at its end, less that of a process which
only imports the library. The model on disk grows fourfold, the peak should not.

    python benchmarks/memory.py --json benchmarks/results/memory.json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import arguments, publish
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from voroq.pipeline.text import DEMO_MODEL

RUN = """
import json, sys
from voroq.methods import RTN
from voroq.pipeline.memory import peak_memory
from voroq.pipeline.run import quantize_model
import transformers.models.llama.modeling_llama
base = peak_memory()["rss"]
report = quantize_model(sys.argv[1], sys.argv[2], RTN(bits=4), samples=32, context=128)
print(json.dumps({"base": base, "peak": peak_memory()["rss"], "seconds": report["seconds"]}))
"""


def main() -> None:
    args = arguments(__doc__).parse_args()
    hidden, inner, counts = (128, 256, (2, 4)) if args.quick else (768, 2048, (4, 8, 16))
    rows = []
    for blocks in counts:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model"
            config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=hidden // 64,
                                 num_key_value_heads=hidden // 64, vocab_size=4096, max_position_embeddings=512)  # fmt: skip
            torch.manual_seed(0)
            LlamaForCausalLM(config).half().save_pretrained(source)
            AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(source)
            size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            done = subprocess.run(
                [sys.executable, "-c", RUN, str(source), str(Path(folder) / "out")], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
        block = (4 * hidden * hidden + 3 * hidden * inner) * 2
        sizes = {"model_mb": size / 1e6, "block_mb": block / 1e6, "peak_over_import_mb": (found["peak"] - found["base"]) / 1e6}
        rows.append({"blocks": str(blocks), **sizes, "peak_mb": found["peak"] / 1e6, "seconds": found["seconds"]})
    publish("peak resident memory of quantize (RTN 4 bits, one process each)", rows, args)


if __name__ == "__main__":
    main()
