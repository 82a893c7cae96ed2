"""Quantize the bundled model with an own plan, load the result in transformers, and let it write.

    python examples/quantize_and_load.py OUT
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import voroq
from voroq.methods import VPTQ
from voroq.pipeline.plan import Plan
from voroq.pipeline.text import DEMO_MODEL


def main(out: str, samples: int = 128) -> str:
    plan = Plan(
        default=VPTQ(vector_length=4, table_bits=8),
        rules=(("*.self_attn.[kv]_proj", VPTQ(vector_length=2, table_bits=6)),),  # small matrices: smaller tables, more bits
    )
    report = voroq.quantize_model(DEMO_MODEL, out, plan, samples=samples, context=256)
    print(f"{report['bits_per_weight']:.3f} bits per weight, everything stored counted")

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = tokenizer("The sea was", return_tensors="pt")
    return tokenizer.decode(model.generate(tokens.input_ids, max_new_tokens=24, do_sample=False)[0])


if __name__ == "__main__":
    print(main(sys.argv[1]))
