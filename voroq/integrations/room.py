"""A cache layer that grows in place: keys and values are the beginning of buffers with room behind, so that a new token copies itself only,
where transformers' own copies the whole past."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer

Keys = Float[Tensor, "batch heads tok size"]
Seen = tuple[Float[Tensor, "batch heads past size"], Float[Tensor, "batch heads past width"]]
"""All keys and values so far."""

LEAST = 256
"""Tokens of the smallest buffer."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values. What cropping or reordering puts in place of `keys` and `values` is copied when next added to."""

    buffers: tuple[Tensor, Tensor]

    @staticmethod
    def taking(layer: DynamicLayer) -> "RoomyLayer":
        """What `layer` holds, which must be something."""
        taken = RoomyLayer()
        taken.lazy_initialization(layer.keys, layer.values)
        taken.keys, taken.values = layer.keys, layer.values
        return taken

    def update(self, key_states: Keys, value_states: Float[Tensor, "batch heads tok width"], *args: Any, **kwargs: Any) -> Seen:
        """Add tokens; all keys and values. With gradients, as transformers does."""
        if key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        past, new = self.keys.shape[2], key_states.shape[2]
        self.make_room(new)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, past : past + new] = states
        self.grow(new)
        return self.keys, self.values

    def make_room(self, new: int) -> None:
        """Buffers in which `new` tokens have a place behind the present ones."""
        length = self.keys.shape[2] + new
        if self._in_place() and self.buffers[0].shape[2] >= length:
            return
        room = max(LEAST, 1 << (length + length // 4).bit_length())
        self.buffers = tuple(held.new_empty((*held.shape[:2], room, held.shape[3])) for held in (self.keys, self.values))
        for buffer, held in zip(self.buffers, (self.keys, self.values), strict=True):
            buffer[:, :, : held.shape[2]] = held
        self.grow(0)

    def grow(self, new: int) -> None:
        """Count `new` tokens more, whose keys and values are in the buffers."""
        length = self.keys.shape[2] + new
        self.keys, self.values = (buffer.narrow(2, 0, length) for buffer in self.buffers)

    def _in_place(self) -> bool:
        """Whether keys and values are the beginning of the buffers still, and those may be written to."""
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        pairs = zip(getattr(self, "buffers", ()), (self.keys, self.values), strict=False)
        same = [b.data_ptr() == held.data_ptr() and b.stride() == held.stride() and b.shape[0] == held.shape[0] for b, held in pairs]
        return len(same) == 2 and all(same)
