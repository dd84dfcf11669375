"""A key-value cache that is written in place: a step costs one row per sequence, not a copy of all that went before."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# What a model's forward calls its key-value cache: transformers renamed it in 5.24.
_RENAMED = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
CACHE_NAME = "cache" if _RENAMED else "past_key_values"
_GROWTH = 256  # positions that are added when a layer's room is used up


class _RoomyLayer(DynamicLayer):
    """Keys and values (S, H, T, K) as views of buffers that have room for more positions."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        length = held + key_states.shape[-2]
        if not self._buffers or length > self._buffers[0].shape[-2]:
            self._grow((key_states, value_states), held, length)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:length] = new
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values

    def _grow(self, new: tuple[Tensor, Tensor], held: int, length: int) -> None:
        buffers = []
        for number, states in enumerate(new):
            sequences, heads, _, size = states.shape
            buffer = states.new_empty(sequences, heads, length + _GROWTH, size)
            if held:
                buffer[:, :, :held] = (self.keys, self.values)[number]
            buffers.append(buffer)
        self._buffers = buffers

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = []  # the selected rows are copies without room


class RoomyCache(Cache):
    """An empty cache for a model whose layers all attend to everything before them."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_RoomyLayer)

    def selected(self, rows: Tensor) -> RoomyCache:
        """A new cache with these sequences, in this order; this one stays as it is."""
        chosen = RoomyCache()
        for number, layer in enumerate(self.layers):
            chosen.update(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), number)
        return chosen


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes in all layers of a text model's configuration."""
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kv_heads * size * dtype.itemsize)
