"""A first estimate of memory: what `auto` settings and --dry-run are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttrain.model.flops import ModelShape


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes. Activations are per token in flight, without and with gradient checkpointing."""

    weights: int
    training_state: int  # gradients, fp32 masters, optimizer moments
    per_token: int
    per_token_checkpointed: int
    total: int  # of the device

    def fits(self, tokens: int, checkpointing: bool) -> bool:
        per_token = self.per_token_checkpointed if checkpointing else self.per_token
        return self.weights + self.training_state + tokens * per_token < 0.85 * self.total

    def peak(self, tokens: int, checkpointing: bool) -> int:
        per_token = self.per_token_checkpointed if checkpointing else self.per_token
        return self.weights + self.training_state + tokens * per_token


def device_memory(device: torch.device) -> int:
    """Bytes of the device, of a control group's limit where there is one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def estimate(model: Any, shape: ModelShape, device: torch.device, eight_bit: bool) -> MemoryEstimate:
    """From parameters as loaded and the decoder's widths; activations of a layer as autograd keeps them."""
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    master = 0 if size == 4 else 4
    state = trained * (4 + master + (2 if eight_bit else 8))
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = getattr(config, "num_attention_heads", 1)
    keys = 2 * hidden * (getattr(config, "num_key_value_heads", None) or heads) // heads
    layer = (8 * hidden + 2 * keys + 4 * inner) * size
    rank_share = 0 if not shape.adapter_weights else layer // 8
    per_token = config.num_hidden_layers * (layer + rank_share)
    checkpointed = config.num_hidden_layers * hidden * size + layer + rank_share
    return MemoryEstimate(
        weights=weights,
        training_state=state,
        per_token=per_token,
        per_token_checkpointed=checkpointed,
        total=device_memory(device),
    )


def choose_pack(memory: MemoryEstimate, device: torch.device, longest_group: int, checkpointing: bool) -> int:
    """`tokens_per_pack: auto`: as much as fits, up to where bigger packs stop being faster."""
    ceiling = 2048 if device.type == "cpu" else 16384
    tokens = ceiling
    while tokens > 512 and not memory.fits(tokens, checkpointing):
        tokens //= 2
    return max(tokens, min(longest_group, ceiling))
