"""A key-value cache that keeps what is not recent in 1 to 4 bits a number:

    model.generate(tokens, past_key_values=voroq.PyramidCache(model.config, bits=3))

Every head's key and value is a row of its own (`codebook/rows.py`): encoded when it is no longer recent, once and for ever, without
looking at other tokens. Attention sees the `recent` newest tokens, and those of the call at hand, as they are, older ones decoded. So
that not every call encodes, up to twice as many wait; with recent=0 all are encoded at the end of the call that brings them.

Decoding goes over the whole past at every call: memory is what this saves.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from voroq.codebook.rows import RowCode
from voroq.errors import VoroqError

Keys = Float[Tensor, "batch heads tok size"]
Values = Float[Tensor, "batch heads tok width"]
Seen = tuple[Float[Tensor, "batch heads past size"], Float[Tensor, "batch heads past width"]]
"""All keys and values so far."""


class PyramidLayer(DynamicLayer):
    """One layer's keys and values; `keys` and `values` hold the recent tokens, `coded` the others."""

    def __init__(self, bits: float, *, recent: int, seed: int) -> None:
        super().__init__()
        self.bits, self.recent, self.seed = bits, recent, seed
        self.codes: tuple[RowCode, RowCode] | None = None
        self.coded: tuple[Tensor, ...] | None = None  # key words, key scales, value words, value scales, each [batch heads tok ...]

    def lazy_initialization(self, key_states: Keys, value_states: Values) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codes = tuple(RowCode(t.shape[-1], self.bits, 2 * self.seed + i) for i, t in enumerate((key_states, value_states)))
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Keys, value_states: Values, *args: Any, **kwargs: Any) -> Seen:
        """Add tokens; all keys and values, the older ones decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        seen = self.keys, self.values
        if self.coded is not None:
            seen = tuple(torch.cat([past, now], dim=-2) for past, now in zip(self.decoded(), seen, strict=True))
        if self.keys.shape[-2] > 2 * self.recent:
            self._encode(self.keys.shape[-2] - self.recent)
        return seen

    def decoded(self) -> Seen:
        """Keys and values of the coded tokens."""
        key, value = self.codes
        return key.decode(*self.coded[:2]).to(self.dtype), value.decode(*self.coded[2:]).to(self.dtype)

    @torch.no_grad()
    def _encode(self, count: int) -> None:
        """Move the `count` oldest recent tokens to the coded ones."""
        key, value = self.codes
        new = (*key.encode(self.keys[:, :, :count]), *value.encode(self.values[:, :, :count]))
        self.coded = new if self.coded is None else tuple(torch.cat(pair, dim=2) for pair in zip(self.coded, new, strict=True))
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()  # a view would keep the rest alive

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return self.keys.shape[-2] + (0 if self.coded is None else self.coded[0].shape[2])

    def nbytes(self) -> int:
        tensors = [self.keys, self.values, *(self.coded or ())] if self.is_initialized else []
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def reset(self) -> None:
        self.keys = self.values = self.coded = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest -n tokens for n below 0; older releases of transformers give the length to keep instead."""
        length = self.get_seq_length()
        keep = max(0, length + tokens_to_remove) if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        coded = length - self.keys.shape[-2] if self.is_initialized else 0
        if keep < coded:
            self.coded = tuple(tensor[:, :, :keep] for tensor in self.coded)
        self._map(lambda tensor: tensor, recent=lambda tensor: tensor[:, :, : max(0, keep - coded)])

    def reorder_cache(self, beam_idx: Int[Tensor, "batch"]) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor], *, recent: Callable[[Tensor], Tensor] | None = None) -> None:
        if self.is_initialized:
            self.keys, self.values = (recent or change)(self.keys), (recent or change)(self.values)
            self.coded = None if self.coded is None else tuple(change(tensor) for tensor in self.coded)


class PyramidCache(DynamicCache):
    """A cache for the model of `config`: `bits` (1 to 4, to 6 for odd head sizes) a number and a 16-bit scale per head and token.

    The newest `recent` tokens stay as they are. Layers with a sliding window or a recurrent state hold little and stay as transformers
    makes them. `nbytes` is what it holds now. Raises VoroqError for models without a layer of full attention and for bits out of range.
    """

    def __init__(self, config: PreTrainedConfig, bits: float = 4.0, *, recent: int = 32) -> None:
        super().__init__(config=config)
        if recent < 0:
            raise VoroqError(f"recent={recent} is out of range; give 0 or more tokens")
        text = config.get_text_config(decoder=True)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        RowCode(size, bits)  # says now what is out of range
        plain = [type(layer) is DynamicLayer for layer in self.layers]
        if not any(plain):
            raise VoroqError(f"{type(config).__name__} has no layer of full attention, whose cache grows; leave the quantized cache out")
        pairs = enumerate(zip(self.layers, plain, strict=True))
        self.layers = [PyramidLayer(bits, recent=recent, seed=i) if full else layer for i, (layer, full) in pairs]

    def nbytes(self) -> int:
        """Bytes of all keys and values held now."""
        held = [layer for layer in self.layers if not isinstance(layer, PyramidLayer) and getattr(layer, "keys", None) is not None]
        exact = sum(t.numel() * t.element_size() for layer in held for t in (layer.keys, layer.values))
        return exact + sum(layer.nbytes() for layer in self.layers if isinstance(layer, PyramidLayer))
