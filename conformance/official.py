"""The other side: runs in the official package's own environment, where voroq is not installed. Talks in files.

    python official.py versions
    python official.py weights FOLDER       every case FOLDER/NAME: official module, loaded strictly -> NAME/official.safetensors
    python official.py make FOLDER          codes in NAME/codes.safetensors -> packed by official code, NAME/model.safetensors and config
    python official.py generate JOB.json    the official loader and `generate`

`import vptq` needs sentence_transformers for one isinstance check and prints that its compiled kernels are missing; the first is
stubbed, the second is what is wanted: the pure torch path.
"""

import contextlib
import json
import math
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

for name in ("sentence_transformers", "sentence_transformers.SentenceTransformer"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].SentenceTransformer = type("SentenceTransformer", (), {})
with contextlib.redirect_stdout(sys.stderr):
    import vptq
    from vptq.utils.pack import absorb_perm, pack_index, pack_model


def versions():
    import accelerate
    import transformers

    modules = {"vptq": vptq, "torch": torch, "transformers": transformers, "accelerate": accelerate}
    return {name: module.__version__ for name, module in modules.items()}


def layer_of(folder):
    config = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]["config_for_layers"]["m"]


def run(module, columns):
    """The dense weight that the module's own forward hands to `linear`, and what it computes from the inputs."""
    with mock.patch.object(torch.nn.functional, "linear", lambda x, weight, bias=None: weight):
        weight = module(torch.zeros(4, columns, dtype=module.centroids.weight.dtype)).detach().clone()
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    return {"weight": weight.contiguous(), "y": module(x).detach().clone()}


def weights(folder):
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        tensors = {name.removeprefix("m."): tensor for name, tensor in load_file(case / "model.safetensors").items()}
        layer = layer_of(case)
        module = vptq.VQuantLinear(**layer, enable_proxy_error=False, dtype=tensors["centroids.weight"].dtype)
        module.load_state_dict(tensors, strict=True)
        save_file(run(module, layer["in_features"]), case / "official.safetensors")


def make(folder):
    """Files by official code: `pack_index` for all, the whole `pack_model` where the released module can be built unpacked, and
    `absorb_perm` where it applies (one group, no outliers)."""
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        layer, given = layer_of(case), load_file(case / "codes.safetensors")
        dtype = given["centroids.weight"].dtype
        real = {name: tensor for name, tensor in given.items() if name not in ("main", "res", "outlier", "perm")}
        narrow = {"outlier_indices": given.get("outlier"), "perm": given.get("perm")}
        real |= {name: tensor.to(torch.uint16).view(torch.int16) for name, tensor in narrow.items() if tensor is not None}
        real["indices"] = pack_index(
            given["main"].to(torch.uint16),
            int(math.log2(layer["num_centroids"][1])),
            given["res"].to(torch.uint16) if "res" in given else None,
            int(math.log2(layer["num_res_centroids"][1])) if "res" in given else 0,
            index_dtype=torch.uint16,
        )
        module = vptq.VQuantLinear(**layer, enable_proxy_error=False, dtype=dtype)
        module.load_state_dict(real, strict=True)
        save_file({f"m.{name}": tensor.contiguous() for name, tensor in module.state_dict().items()}, case / "model.safetensors")
        save_file(run(module, layer["in_features"]), case / "official.safetensors")
        extra = {}
        if "res" not in given and "perm" in given:
            extra["pack_model"] = whole(layer, given, dtype)
        if layer["enable_perm"] and layer["group_num"] == 1 and not layer["outlier_size"]:
            module.config = types.SimpleNamespace(quantization_config={"config_for_layers": {"m": dict(layer)}})
            absorb_perm(module)
            extra["absorb_perm"] = {name: tensor for name, tensor in module.state_dict().items() if name != "perm"}
        for tool, state in extra.items():
            save_file({f"m.{name}": tensor.contiguous() for name, tensor in state.items()}, case / f"{tool}.safetensors")


def whole(layer, given, dtype):
    """What `pack_model` makes of a model with one unpacked module."""
    unpacked = layer | {"is_indice_packed": False}
    model = torch.nn.Module()
    model.m = vptq.VQuantLinear(**unpacked, enable_proxy_error=False, dtype=dtype)
    model.m.init_args = dict(unpacked)
    model.config = types.SimpleNamespace(to_dict=lambda: {"quantization_config": model.config.quantization_config})
    model.config.update = lambda values: None
    state = {name: tensor for name, tensor in given.items() if name not in ("main", "outlier", "perm")}
    state |= {"indices": given["main"].to(torch.uint16).view(torch.int16), "perm": given["perm"].long()}
    if "outlier" in given:
        state["outlier_indices"] = given["outlier"].to(torch.uint16).view(torch.int16)
    model.m.load_state_dict(state, strict=True)
    model.m.indices.data = model.m.indices.data.view(torch.int16)
    for parameter in model.m.parameters():
        parameter.requires_grad_(False)
    pack_model(model, torch.uint16, torch.uint16, torch.int16)
    return model.m.state_dict()


def generate(job):
    """The greedy continuation and the logits of the prompt, for every prompt."""
    kwargs = {"dtype": getattr(torch, job["dtype"])} if job["dtype"] else {}
    model = vptq.AutoModelForCausalLM.from_pretrained(job["folder"], device_map={"": "cpu"}, **kwargs)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "VQuantLinear" in kinds, kinds
    out = {}
    for number, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out[f"tokens.{number}"] = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["new"], do_sample=False, eos_token_id=None, pad_token_id=0
            )
            out[f"logits.{number}"] = model(ids).logits
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, job["out"])


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "versions":
        sys.stdout.write(json.dumps(versions()))
    elif what == "generate":
        generate(json.loads(Path(rest[0]).read_text()))
    else:
        {"weights": weights, "make": make}[what](Path(rest[0]))
