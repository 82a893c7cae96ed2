"""Streaming block by block is the whole model, for every architecture and without knowing any."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from voroq.errors import VoroqError
from voroq.experts import unstack_experts
from voroq.pipeline.model import OpenModel, open_model
from voroq.pipeline.observe import run_block
from voroq.pipeline.source import open_source
from voroq.pipeline.tiny_models_test import CONFIGS, save_tiny, tiny_tokens

BLOCKS = {"GPTNeoX": "gpt_neox.layers", "OPT": "model.decoder.layers", "Bert": "bert.encoder.layer"}
ALL = pytest.mark.parametrize("name", CONFIGS)


def opened(folder: Path) -> OpenModel:
    return open_model(open_source(folder), device="cpu")


def block_outputs(model, blocks: nn.ModuleList, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Every block's output in one forward of the whole model."""
    outputs = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)) for block in blocks]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return outputs


def real_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.is_meta)


@ALL
def test_streaming_reproduces_the_whole_model(name, tmp_path):
    whole, tokens = save_tiny(name, tmp_path), tiny_tokens()
    model = opened(tmp_path)
    assert model.blocks_name == BLOCKS.get(name, "model.layers")
    assert model.n_blocks == 3
    expected = block_outputs(whole, whole.get_submodule(model.blocks_name), tokens)
    with model.capture(tokens, 2, limit=0, folder=tmp_path / "work") as states:
        assert states.spilled
        assert real_parameters(model.skeleton) == 0
        for index in range(model.n_blocks):
            block = model.load_block(index)
            run_block(model, block, index, states, 2, states)
            torch.testing.assert_close(states.read(0, 3), expected[index], rtol=1e-5, atol=1e-5)
            assert real_parameters(model.skeleton) == 0
            assert real_parameters(block) == sum(p.numel() for p in block.parameters())
            model.drop_block(index)
            assert real_parameters(block) == 0


@ALL
def test_block_weights_are_the_whole_models(name, tmp_path):
    whole = save_tiny(name, tmp_path, shards="20KB")
    model = opened(tmp_path)
    assert len(model.source.files()) > 1
    unstack_experts(whole)
    for index in range(model.n_blocks):
        block = model.load_block(index)
        expected = whole.get_submodule(model.block_name(index)).state_dict()
        assert list(block.state_dict()) == list(expected)
        assert all(torch.equal(block.state_dict()[key], expected[key]) for key in expected)
        model.drop_block(index)


@ALL
def test_sites_are_all_linears_but_routers(name, tmp_path):
    whole = save_tiny(name, tmp_path)
    model = opened(tmp_path)
    unstack_experts(whole)
    for index in range(model.n_blocks):
        linears = {n: m for n, m in whole.named_modules() if type(m) is nn.Linear and n.startswith(f"{model.block_name(index)}.")}
        sites = model.sites(index)
        assert [site.name for site in sites] == list(linears)
        assert all(site.shape == tuple(linears[site.name].weight.shape) for site in sites)
        assert all(site.expert == (".experts." in site.name) for site in sites)
        others = {n for n, p in whole.get_submodule(model.block_name(index)).named_parameters(model.block_name(index)) if p.dim() > 1}
        assert set(model.unquantizable(index)) == others - {f"{n}.weight" for n in linears}
        assert any("gate" in n for n in model.unquantizable(index)) == any(site.expert for site in sites)


@ALL
def test_every_tensor_on_disk_has_one_home_and_sites_are_fed(name, tmp_path):
    save_tiny(name, tmp_path)
    model = opened(tmp_path)
    inside = [tensor for index in range(model.n_blocks) for tensor in model.block_tensors(index)]
    assert sorted(inside + model.outer_tensors()) == sorted(model.source.tensors)
    assert all(model.site_of(tensor) is None for tensor in model.outer_tensors())
    for index in range(model.n_blocks):
        fed = {site for tensor in model.block_tensors(index) for site in model.site_of(tensor) or []}
        assert fed == {site.name for site in model.sites(index)}
        assert all(model.site_of(tensor) is None for tensor in model.block_tensors(index) if tensor.endswith("bias"))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_an_experts_tensor_on_disk_feeds_its_own_site(name, tmp_path):
    save_tiny(name, tmp_path)
    model = opened(tmp_path)
    block = model.load_block(1)
    linears = model.linears(block, 1)
    experts = [tensor for tensor in model.block_tensors(1) if ".experts." in tensor]
    assert experts
    for tensor in experts:
        (site,) = model.site_of(tensor)
        stored, weight = model.source.tensor(tensor), linears[site].weight
        halves = weight.chunk(2) if stored.shape != weight.shape else [weight]
        assert any(torch.equal(stored, half) for half in halves)


def test_experts_stacked_on_disk_feed_all_their_sites(tmp_path):
    whole = save_tiny("Mixtral", tmp_path)
    save_file({key: value.contiguous() for key, value in whole.state_dict().items()}, tmp_path / "model.safetensors")
    model = opened(tmp_path)
    assert model.site_of("model.layers.2.mlp.experts.down_proj") == [f"model.layers.2.mlp.experts.{e}.down_proj" for e in range(4)]
    block = model.load_block(2)
    linear = model.linears(block, 2)["model.layers.2.mlp.experts.3.down_proj"]
    assert torch.equal(linear.weight, whole.model.layers[2].mlp.experts.down_proj[3])


def test_old_names_on_disk_are_understood(tmp_path):
    whole, tokens = save_tiny("Bert", tmp_path), tiny_tokens()
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    old["bert.encoder.layer.1.attention.self.leftover"] = torch.zeros(2)
    old["bert.embeddings.position_ids"] = torch.arange(64)
    save_file(old, tmp_path / "model.safetensors")
    model = opened(tmp_path)
    assert "bert.encoder.layer.1.attention.output.LayerNorm.gamma" in model.block_tensors(1)
    assert "bert.encoder.layer.1.attention.self.leftover" in model.block_tensors(1)
    assert "bert.embeddings.position_ids" in model.outer_tensors()
    states = model.capture(tokens, 3, limit=1 << 20, folder=tmp_path)
    run_block(model, model.load_block(0), 0, states, 3, states)
    torch.testing.assert_close(states.read(0, 3), block_outputs(whole, whole.bert.encoder.layer, tokens)[0])


def test_a_weight_looked_at_before_its_module_is_called(tmp_path):
    # Llama 4 moves its tokens to the device of the embedding's weight; torch then embeds without complaint what nobody wrote.
    config = transformers.Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    whole, tokens = transformers.Llama4ForCausalLM(config).eval(), tiny_tokens()
    whole.save_pretrained(tmp_path)
    model = opened(tmp_path)
    expected = block_outputs(whole, whole.model.layers, tokens)
    states = model.capture(tokens, 2, limit=1 << 20, folder=tmp_path)
    for index in range(2):
        run_block(model, model.load_block(index), index, states, 2, states)
        torch.testing.assert_close(states.read(0, 3), expected[index])
        model.drop_block(index)
    # Its experts are stacked the other way round: no sites, but owned up to.
    assert not any(site.expert for site in model.sites(0))
    assert model.unquantizable(0)["model.layers.0.feed_forward.experts.gate_up_proj"] == (4, 32, 48)


def test_arguments_that_depend_on_tokens_are_refused(tmp_path, monkeypatch):
    save_tiny("Llama", tmp_path)
    model = opened(tmp_path)
    original = transformers.LlamaModel.forward

    def forward(self, input_ids=None, **kwargs):
        return original(self, input_ids=input_ids, per_token=input_ids * 2, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    model.capture(tiny_tokens(3), 2, limit=1 << 20, folder=tmp_path)  # every batch size once: nothing to confuse
    with pytest.raises(VoroqError, match="depend on the tokens"):
        model.capture(tiny_tokens(4), 2, limit=1 << 20, folder=tmp_path)


def test_hidden_states_changed_between_blocks_are_refused(tmp_path, monkeypatch):
    save_tiny("Bert", tmp_path)
    model = opened(tmp_path)

    def forward(self, hidden, *args, **kwargs):
        for block in self.layer:
            hidden = block(hidden, *args, **kwargs) + 1
        return hidden

    monkeypatch.setattr(type(model.skeleton.bert.encoder), "forward", forward)
    with pytest.raises(VoroqError, match="changes hidden states between blocks 0 and 1"):
        model.capture(tiny_tokens(), 3, limit=1 << 20, folder=tmp_path)


def test_tensors_passed_between_blocks_are_refused(tmp_path):
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, is_encoder_decoder=False)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(VoroqError, match="that block 0 made"):
        opened(tmp_path).capture(tiny_tokens(), 3, limit=1 << 20, folder=tmp_path)


def test_a_head_without_its_tied_embedding_is_enough(tmp_path):
    whole, tokens = save_tiny("Qwen3", tmp_path), tiny_tokens()
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors")
    states = opened(tmp_path).capture(tokens, 3, limit=1 << 20, folder=tmp_path)
    assert torch.equal(states.read(0, 3), whole.model.embed_tokens(tokens))


def test_buffers_are_real(tmp_path):
    whole = save_tiny("Llama", tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0})
    assert torch.equal(opened(tmp_path).skeleton.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)


def test_only_recorded_batch_sizes_run(tmp_path):
    save_tiny("Llama", tmp_path)
    model = opened(tmp_path)
    model.capture(tiny_tokens(3), 2, limit=1 << 20, folder=tmp_path)
    block = model.load_block(0)
    assert model.forward_block(block, 0, torch.zeros(1, 12, 32)).shape == (1, 12, 32)
    with pytest.raises(ValueError, match="batches of"):
        model.forward_block(block, 0, torch.zeros(3, 12, 32))


# ---- bad input --------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


def reconfigured(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(value, tmp_path):
    save_tiny("Llama", tmp_path)
    rewritten(tmp_path, lambda stored: stored["model.layers.1.mlp.up_proj.weight"].view(-1)[7:8].fill_(value))
    model = opened(tmp_path)
    model.load_block(0)
    with pytest.raises(VoroqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*NaN or infinity"):
        model.load_block(1)


def test_missing_and_misshapen_weights_are_named_before_anything_runs(tmp_path):
    save_tiny("Llama", tmp_path)
    rewritten(tmp_path, lambda stored: stored.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}))
    with pytest.raises(VoroqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight must be \(48, 32\)"):
        opened(tmp_path)
    rewritten(tmp_path, lambda stored: stored.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(VoroqError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        opened(tmp_path)


def test_a_missing_embedding_is_named_when_it_is_needed(tmp_path):
    save_tiny("Llama", tmp_path)
    rewritten(tmp_path, lambda stored: stored.pop("model.embed_tokens.weight"))
    with pytest.raises(VoroqError, match=r"no tensor for model\.embed_tokens\.weight"):
        opened(tmp_path).capture(tiny_tokens(), 3, limit=1 << 20, folder=tmp_path)


def test_a_missing_expert_is_an_error(tmp_path):
    save_tiny("Mixtral", tmp_path)
    rewritten(tmp_path, lambda stored: stored.pop(next(key for key in stored if ".experts.2.w1" in key)))
    with pytest.raises(VoroqError, match="gate_up_proj"):
        opened(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    save_tiny("Llama", tmp_path)
    rewritten(tmp_path, lambda stored: stored.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.int8)}))
    with pytest.raises(VoroqError, match="int8"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}, "code of its own .* trust_remote_code=True"),
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"architectures": ["os"]}, "no architecture 'os'"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"hidden_size": "wide"}, "hidden_size|wide|int"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
    ],
)
def test_bad_configs_are_refused_in_one_line(changes, message, tmp_path):
    save_tiny("Llama", tmp_path)
    reconfigured(tmp_path, **changes)
    with pytest.raises(VoroqError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_models_without_linears_in_blocks_are_refused(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(VoroqError, match=r"transformer\.h \(2 x GPT2Block\)"):
        opened(tmp_path)


def test_encoder_decoders_are_refused(tmp_path):
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(VoroqError, match="encoder-decoder"):
        opened(tmp_path)


def test_repeated_blocks_are_refused(tmp_path):
    config = transformers.AlbertConfig(
        vocab_size=64, hidden_size=32, embedding_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.AlbertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(VoroqError, match="not supported"):
        opened(tmp_path).capture(tiny_tokens(), 3, limit=1 << 20, folder=tmp_path)
