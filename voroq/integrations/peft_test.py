"""LoRA adapters on quantized linears, with the PEFT that is installed; voroq itself does without."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import voroq
from voroq.errors import VoroqError
from voroq.integrations.conftest import write_model
from voroq.integrations.transformers import quant_linears

peft = pytest.importorskip("peft")
TOKENS = torch.arange(3, 19)[None]
PLACES = ["q_proj", "down_proj"]


def base(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def adapted(path, dtype=torch.float32, **more):
    torch.manual_seed(0)
    return peft.get_peft_model(base(path, dtype), voroq.lora(peft.LoraConfig(r=4, target_modules=PLACES, task_type="CAUSAL_LM", **more)))


@pytest.mark.parametrize("layout", ["vptq", "voroq"])
def test_gradients_reach_adapters_and_input_and_nothing_else(tmp_path, layout):
    write_model(tmp_path, "llama", layout)
    model = adapted(tmp_path)
    plain = base(tmp_path)(TOKENS).logits
    assert torch.equal(model(TOKENS).logits, plain)  # B starts as zero
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=TOKENS).loss
    loss.backward()
    assert embedded.grad.abs().sum() > 0
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * 2 * len(PLACES) and all(".lora_" in name for name in learning)
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in learning.items() if "lora_B" in name)
    optimizer = torch.optim.Adam(learning.values(), lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        now = model(TOKENS, labels=TOKENS).loss
        now.backward()
        optimizer.step()
    assert now < loss - 0.05
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, plain)


def test_an_adapter_is_what_low_rank_adaptation_says(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    model = adapted(tmp_path, lora_alpha=6)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 32)
    low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 6 / 4
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ low_rank.T, atol=1e-5)


def test_adapters_are_saved_alone_and_load_again(tmp_path):
    write_model(tmp_path / "m", "llama", "vptq")
    model = adapted(tmp_path / "m", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "model.safetensors").exists()
    config = voroq.lora(peft.PeftConfig.from_pretrained(tmp_path / "a"))
    again = peft.PeftModel.from_pretrained(base(tmp_path / "m", torch.bfloat16), tmp_path / "a", config=config)
    assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)
    assert again.unload() is not None and len(quant_linears(again.base_model.model)) == 14


def test_what_cannot_be_is_refused(tmp_path):
    write_model(tmp_path, "llama", "vptq")
    with pytest.raises(VoroqError, match="leave out use_dora"):
        adapted(tmp_path, use_dora=True)
    with pytest.raises(VoroqError, match="cannot be merged into codes"):
        adapted(tmp_path).merge_and_unload()
    with pytest.raises(VoroqError, match=r"a peft.LoraConfig is needed, got IA3Config"):
        voroq.lora(peft.IA3Config())
