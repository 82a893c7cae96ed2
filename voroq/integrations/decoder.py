"""Steps of one token on the CPU, in one call of the library: `why_not = speed_up(model)`.

A step through a small model is a thousand small operations, and starting them takes longer than the products themselves. Models of Llama's
form (q, k, v, o; gate, up, down; two norms a block; Mistral, Qwen and many more) go through csrc/cpu/step.cpp instead. No list of
architectures says which those are: a model must have the parts, and a step must give what the model itself gives. Prompts, batches,
gradients and whatever else does not fit a step go through the model as before.
"""

import os
from collections.abc import Callable
from functools import lru_cache, wraps
from inspect import signature
from threading import Lock
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from voroq import native
from voroq.integrations.compat import cache_argument
from voroq.integrations.room import RoomyLayer
from voroq.integrations.siblings import share
from voroq.kernels import VARIABLE, cpu
from voroq.layer import QuantLinear
from voroq.native import REALS
from voroq.numerics.hadamard import paley, split
from voroq.transform.hadamard import Hadamard

ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.1}
"""Of the logits' norm, how far a step may be from the model, which rounds after every operation."""
PROBE = (11, 7, 5)
"""Tokens with which the two are compared."""
KNOWN = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values"}
KNOWN |= {"use_cache", "return_dict", "logits_to_keep", "num_logits_to_keep", "cache_position"}
"""Arguments that are looked at, and those that change nothing for one token behind a cache."""


class Unfit(Exception):
    """What keeps a model from steps in the library."""


def speed_up(model: nn.Module) -> str | None:
    """Let `model`, in eval mode, decode faster: on the CPU it makes steps of one token in the library, on CUDA its linears that read the
    same input are multiplied together (`siblings.py`). None, or why it goes on as before."""
    if any(parameter.is_cuda for parameter in model.parameters()):
        return share(model)
    replaced = vars(model).get("forward")
    if replaced is not None:
        return None if getattr(replaced, "steps", False) else "its forward has been replaced"
    try:
        decoder = Decoder(model)
        decoder.check()
    except Unfit as unfit:
        return str(unfit)
    model.forward = MethodType(decoder.wrapped(), model)
    return None


class Decoder:
    """A model taken apart: what `voroq_step` needs to know, all by address, and the tensors that must live as long."""

    def __init__(self, model: nn.Module) -> None:
        if native.library() is None:
            raise Unfit("the library of CPU kernels is missing (voroq doctor)")
        if os.environ.get(VARIABLE) not in (None, "", "cpu"):
            raise Unfit(f"{VARIABLE} asks for other kernels")
        if any(parameter.device.type != "cpu" for parameter in model.parameters()) or any(hasattr(m, "_hf_hook") for m in model.modules()):
            raise Unfit("not all of it stays on the CPU")
        self.model, self.held, self.lock = model, [], Lock()
        base, self.embedding, head = _part(model, model.base_model_prefix), model.get_input_embeddings(), model.get_output_embeddings()
        blocks, self.rotary, self.dtype = list(_part(base, "layers")), _part(base, "rotary_emb"), self.embedding.weight.dtype
        known = type(self.embedding) is nn.Embedding and self.dtype in REALS and getattr(self.rotary, "rope_type", None) in ROPES
        if not blocks or not known:
            raise Unfit("its embedding, or its rotary embedding, is of another kind")
        if type(head) is not nn.Linear or self.embedding.num_embeddings <= max(PROBE):
            raise Unfit("its head is no plain linear, or it has next to no vocabulary")
        self.layers = (native.Layer * len(blocks))(*(self._layer(block) for block in blocks))
        attention, inner = blocks[0].self_attn, blocks[0].mlp.gate_proj.out_features
        size = _part(attention, "head_dim")
        if size % 16 or len({self._form(block) for block in blocks}) > 1:
            raise Unfit("its blocks differ, or its heads are no multiple of 16 wide")
        self.cosines = self.sines = torch.empty(0, size)
        self._turn_to(0)
        self.step = native.Step(
            *(self.layers, len(blocks), self.embedding.embedding_dim, inner, 0, self._linear(head), self._norm(_part(base, "norm"))),
            *(None, None, None, None),
            *(attention.q_proj.out_features // size, attention.k_proj.out_features // size, size, attention.scaling, REALS[self.dtype]),
        )
        self.vocabulary, self.addresses = head.out_features, self._addresses()

    def wrapped(self) -> Callable[..., Any]:
        """The model's `forward`, with steps through the library where they fit; of a copy of the model, its own."""
        plain = type(self.model).forward
        names = list(signature(plain).parameters)[1:]

        @wraps(plain)
        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if model is not self.model or not self._fits(given):
                return plain(model, *args, **kwargs)
            cache = given.get("cache", given.get("past_key_values"))
            with self.lock:
                logits = self(int(given["input_ids"]), cache)
            return CausalLMOutputWithPast(logits=logits[None, None], **cache_argument(CausalLMOutputWithPast, cache))

        forward.steps = True
        return forward

    def __call__(self, token: int, cache: DynamicCache) -> Float[Tensor, "vocabulary"]:
        """Logits behind `token`, whose keys and values are added to `cache`."""
        past = cache.layers[0].keys.shape[2]
        for i, layer in enumerate(cache.layers):
            if type(layer) is not RoomyLayer:
                cache.layers[i] = layer = RoomyLayer.taking(layer)
            layer.make_room(1)
            keys, values = layer.buffers
            told = self.layers[i]
            told.keys, told.values, told.room = keys.data_ptr(), values.data_ptr(), keys.shape[2]
        self._turn_to(past)
        logits, step = torch.empty(self.vocabulary, dtype=self.dtype), self.step
        step.past, step.threads, step.isa = past, torch.get_num_threads(), cpu.ISA
        step.x = self.embedding.weight.data_ptr() + token * step.hidden * self.dtype.itemsize
        step.cosines, step.sines = self.cosines[past].data_ptr(), self.sines[past].data_ptr()
        step.logits = logits.data_ptr()
        native.call("voroq_step", step)
        for layer in cache.layers:
            layer.grow(1)
        return logits

    @torch.inference_mode()
    def check(self) -> None:
        """Compare a step with the model. Raises Unfit."""
        tokens, cache = torch.tensor([PROBE]), DynamicCache(config=self.model.config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers) or len(cache.layers) != len(self.layers):
            raise Unfit("not all of its layers see all tokens")
        whole = self.model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        self.model(input_ids=tokens[:, :-1], use_cache=True, **cache_argument(self.model.forward, cache))
        error = float((self(PROBE[-1], cache).float() - whole).norm() / whole.norm())
        if not error <= TOLERANCE[self.dtype]:
            raise Unfit(f"it computes something else than its parts suggest: logits differ by {error:.2g} of their norm")

    def _fits(self, given: dict[str, Any]) -> bool:
        """Whether a call with these arguments is one token behind a plain cache, and nothing else."""
        tokens, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        cache = given.get("cache", given.get("past_key_values"))
        if not isinstance(tokens, Tensor) or tokens.shape != (1, 1) or tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() or self.model.training or self.addresses != self._addresses():
            return False
        if any(value is not None and value is not False for name, value in given.items() if name not in KNOWN):
            return False
        if given.get("use_cache") is False or given.get("return_dict") is False:
            return False
        if any(getattr(self.model.config, f"output_{more}", False) for more in ("hidden_states", "attentions")):
            return False
        if not isinstance(cache, DynamicCache) or len(cache.layers) != len(self.layers):
            return False
        if any(type(layer) not in (RoomyLayer, DynamicLayer) or not layer.is_initialized for layer in cache.layers):
            return False
        shapes = {(layer.keys.shape, layer.keys.dtype) for layer in cache.layers}
        past = cache.layers[0].keys.shape[-2]
        if past == 0 or shapes != {((1, self.step.pairs, past, self.step.size), self.dtype)}:
            return False
        if not 0 <= int(tokens) < self.embedding.num_embeddings:
            return False
        whole = mask is None or (isinstance(mask, Tensor) and mask.shape == (1, past + 1) and bool(mask.all()))
        return whole and (positions is None or (positions.numel() == 1 and int(positions) == past))

    def _addresses(self) -> tuple[int, ...]:
        """Where a few weights lie: elsewhere, once the model has moved or changed its type."""
        return tuple(p.data_ptr() for p in (self.embedding.weight, self.model.get_output_embeddings().weight))

    def _turn_to(self, position: int) -> None:
        """Cosines and sines up to `position` and beyond."""
        if position < self.cosines.shape[0]:
            return
        positions = torch.arange(max(256, 2 * position))[None]
        found = [turned[0].contiguous() for turned in self.rotary(torch.zeros(1, 1, self.cosines.shape[1]), positions)]
        if any(turned.shape != (positions.shape[1], self.cosines.shape[1]) for turned in found):
            raise Unfit("its rotary embedding turns a part of a head")
        self.cosines, self.sines = found

    def _form(self, block: nn.Module) -> tuple[Any, ...]:
        """What all blocks must have in common."""
        attention, linears = block.self_attn, (*block.self_attn.children(), *block.mlp.children())
        sizes = [(linear.out_features, linear.in_features) for linear in linears if hasattr(linear, "out_features")]
        return attention.head_dim, attention.scaling, *sizes

    def _layer(self, block: nn.Module) -> native.Layer:
        parts = {name for name, part in block.named_modules() if next(part.parameters(recurse=False), None) is not None}
        attention, mlp = _part(block, "self_attn"), _part(block, "mlp")
        linears = [_part(attention, f"{side}_proj") for side in "qkvo"] + [_part(mlp, f"{side}_proj") for side in ("gate", "up", "down")]
        norms = [_part(block, name) for name in ("input_layernorm", "post_attention_layernorm")]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        known = [m for part in (*linears, *norms) if part is not None for m in part.modules()]
        if any(block.get_submodule(name) not in known for name in parts):
            raise Unfit("its blocks have parts that Llama's have not")
        return native.Layer(*map(self._linear, linears), *map(self._norm, norms))

    def _linear(self, module: nn.Module) -> native.Linear:
        linear = native.Linear()
        if type(module) is nn.Linear and module.weight.dtype in REALS and module.weight.is_contiguous():
            linear.product.out, linear.product.in_ = module.weight.shape
            linear.weight, linear.weight_real = module.weight.data_ptr(), REALS[module.weight.dtype]
        elif type(module) is QuantLinear and module.activations is None and cpu.known(module.spec):
            packed = module.packed()
            inside = cpu.without_transform(packed)
            call = cpu.Call(inside)
            linear.product, linear.whole = call.product(), inside is not packed
            self.held.append(call)
            if linear.whole:
                steps = packed.spec.transform(packed.tensors).steps
                if len(steps) > 1 or not isinstance(steps[0], Hadamard):
                    raise Unfit("a linear's basis is more than one rotation")
                linear.before, linear.after = self._turn(steps[0].input), self._turn(steps[0].output)
        else:
            raise Unfit(f"a linear is a {type(module).__name__} that the library does not know")
        if module.bias is not None:
            linear.bias, linear.bias_real = module.bias.data_ptr(), REALS[module.bias.dtype]
        return linear

    def _turn(self, signs: Int[Tensor, "n"] | None) -> native.Turn:
        if signs is None:
            return native.Turn()
        block, order = split(signs.shape[0])
        signs, core = signs.float().contiguous(), _core(order)
        self.held += [signs, core]
        return native.Turn(signs.data_ptr(), core.data_ptr(), signs.shape[0], block, order)

    def _norm(self, module: nn.Module | None) -> native.Norm:
        if module is None:
            return native.Norm()
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if epsilon is None or [name for name, _ in module.named_parameters()] != ["weight"] or module.weight.dtype not in REALS:
            raise Unfit(f"a norm is a {type(module).__name__}")
        return native.Norm(module.weight.data_ptr(), REALS[module.weight.dtype], epsilon)


@lru_cache(maxsize=8)
def _core(order: int) -> Float[Tensor, "n n"]:
    return paley(order).float().contiguous()


def _part(module: nn.Module, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise Unfit(f"its {type(module).__name__} has no {name}")
    return found
