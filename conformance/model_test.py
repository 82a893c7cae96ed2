"""Whole models: the official loader opens our folders and says what we say."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import voroq
from conftest import ask
from voroq.integrations.conftest import write_model
from voroq.methods import VPTQ
from voroq.packed.conftest import rewrite
from voroq.pipeline.effort import EFFORTS
from voroq.pipeline.plan import make_plan
from voroq.pipeline.planning import plan_model
from voroq.pipeline.text import DEMO_MODEL

TINY = ("llama", "qwen2")  # not tied ones: the official loader moves a model to its device before it ties the head to the embedding
TEXTS = ("The old man looked at the sea and", "In the year 1870 the city", "She opened the door", "Water is")
RECIPES = {
    "v6 k1024 perm": VPTQ(vector_length=6, table_bits=10, kmeans_steps=4, rounds=0),
    "v4 k256 r64 groups 2 outliers norm perm": VPTQ(
        vector_length=4, table_bits=8, residual_bits=6, groups=2, outlier_percent=1, outlier_vector_length=4,
        outlier_table_bits=8, normalize="std", kmeans_steps=4, rounds=0,
    ),
}  # fmt: skip
PRESET = "--effort balanced, shortened"
"""Bits allocated, tables, norms, codes and head tuned."""


def both(folder, prompts: list[list[int]], new: int, dtype: str | None, work) -> list[dict[str, torch.Tensor]]:
    """Greedy tokens and the prompts' logits: the official package's, then ours."""
    out = work / "generated.safetensors"
    job = {"folder": str(folder), "prompts": prompts, "new": new, "dtype": dtype, "out": str(out)}
    (work / "job.json").write_text(json.dumps(job))
    ask("generate", work / "job.json")
    model, _ = voroq.load(folder, device="cpu", dtype=getattr(torch, dtype) if dtype else None)
    mine = {}
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            mine[f"tokens.{number}"] = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            mine[f"logits.{number}"] = model(ids).logits
    return [load_file(out), mine]


@pytest.mark.parametrize("kind", TINY)
def test_tiny_models_of_random_tables_give_the_same_logits_and_tokens(tmp_path, kind):
    write_model(tmp_path / "m", kind, "vptq", dtype=torch.float32)
    if kind == "llama-tied":  # the official loader ties nothing: it needs the head as a tensor of its own
        rewrite(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    official, mine = both(tmp_path / "m", [list(range(3, 19)), [5, 9, 2]], 24, None, tmp_path)
    for name, tensor in mine.items():
        if name.startswith("tokens"):
            assert torch.equal(official[name], tensor), name
        else:
            assert tensor.dtype == official[name].dtype and torch.allclose(official[name], tensor, atol=2e-5), name


@pytest.fixture(scope="module", params=[*RECIPES, PRESET])
def demo(request, tmp_path_factory):
    """The bundled model, quantized by the pipeline itself."""
    folder, tuning, plan = tmp_path_factory.mktemp("demo") / "out", None, RECIPES.get(request.param)
    if request.param == PRESET:
        plan = plan_model(DEMO_MODEL, make_plan("vptq", 2.1, {"kmeans_steps": "4", "rounds": "1"}), samples=16, context=128).plan
        tuning = replace(EFFORTS["balanced"].tuning, steps=8, samples=64)
    report = voroq.quantize_model(DEMO_MODEL, folder, plan, samples=16, context=128, tuning=tuning)
    assert tuning is None or report["tuning"]["kl_after"] < report["tuning"]["kl_before"]
    return request.param, folder


def test_a_model_that_we_quantized_writes_the_same_text_in_the_official_package(demo, tmp_path, found):
    name, folder = demo
    _, tokenizer = voroq.load(folder, device="cpu")
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    official, mine = both(folder, prompts, 48, "float32", tmp_path)
    for number in range(len(prompts)):
        assert torch.equal(official[f"tokens.{number}"], mine[f"tokens.{number}"])
    largest = max(float((official[f"logits.{n}"] - mine[f"logits.{n}"]).abs().max()) for n in range(len(prompts)))
    assert largest < 1e-3
    text = tokenizer.decode(mine["tokens.0"][0, len(prompts[0]) :])
    found(f"demo model, {name}, float32: {len(prompts)} x 48 greedy tokens equal, logits within {largest:.1e}")
    found(f"    {TEXTS[0]} ... {text.split(chr(10))[0]:.80}")


def test_in_the_stored_dtype_the_two_differ_by_rounding_alone(demo, tmp_path, found):
    name, folder = demo
    _, tokenizer = voroq.load(folder, device="cpu")
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    official, mine = both(folder, prompts, 48, None, tmp_path)
    gaps = [(official[f"logits.{n}"].float() - mine[f"logits.{n}"].float()).abs().max() for n in range(len(prompts))]
    best = [official[f"logits.{n}"].argmax(-1) == mine[f"logits.{n}"].argmax(-1) for n in range(len(prompts))]
    assert official["logits.0"].dtype == mine["logits.0"].dtype == torch.float16
    assert max(gaps) < 0.1
    tokens = torch.cat([(official[f"tokens.{n}"] == mine[f"tokens.{n}"]).flatten() for n in range(len(prompts))])
    share = torch.cat([b.flatten() for b in best]).float().mean()
    found(
        f"demo model, {name}, float16: logits within {float(max(gaps)):.3f}, same best token at {share:.1%} of the prompts' places, "
        f"{tokens.float().mean():.1%} of greedy tokens equal"
    )
