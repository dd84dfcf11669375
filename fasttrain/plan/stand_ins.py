"""Attention and head as they use memory, without arithmetic: what a pass on the meta device calls in place of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fasttrain_kernels.head_tiles import cut

PLANNED = "fasttrain_planned"


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, the output and a log-sum-exp per row and head, as every flash kernel does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1])
        lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None


AttentionInterface.register(PLANNED, _attention)


class _Head(torch.autograd.Function):
    """The head's outputs and buffers: one tile of logits, one fp32 accumulator per tile; see `linear_logprob`."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, tiles: HeadTiles) -> Tensor:
        ctx.tiles = tiles
        trained = weight_VD.requires_grad
        buffers = tiles.buffers(hidden_ND, weight_VD, accumulate=not trained)
        logprob_N, shift_N, total_N = (
            hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(3)
        )
        if trained:
            ctx.save_for_backward(hidden_ND, weight_VD, shift_N, total_N)
        else:
            ctx.save_for_backward(torch.empty_like(hidden_ND))
        del buffers
        return logprob_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (unit_ND,) = ctx.saved_tensors
            return torch.empty_like(unit_ND), None, None
        hidden_ND, weight_VD, _, _ = ctx.saved_tensors
        sums_ND = torch.empty_like(hidden_ND, dtype=torch.float32)
        weight_gradient = torch.empty_like(weight_VD)
        buffers = ctx.tiles.buffers(hidden_ND, weight_VD, accumulate=False)
        del buffers
        return sums_ND.to(hidden_ND.dtype), weight_gradient, None


@dataclass(frozen=True)
class HeadTiles:
    """How the head is cut on the device that is planned for."""

    device: torch.device

    def buffers(self, hidden_ND: Tensor, weight_VD: Tensor, accumulate: bool) -> list[Tensor]:
        """Meta tensors of the buffers that live at once: logits, widened operands, accumulators."""
        n, d = hidden_ND.shape
        shape_ND = torch.empty(n, d, device="meta", dtype=hidden_ND.dtype)
        plan = cut(_On(shape_ND, self.device), weight_VD, hidden_ND.dtype)  # type: ignore[arg-type]
        rows = min(n, plan.rows[0].stop) if plan.rows else 0
        tasks = min(plan.together, len(plan.rows)) * len(plan.vocabulary)
        wide = self.device.type == "cpu" and hidden_ND.dtype.itemsize == 2
        columns = min(plan.columns, len(weight_VD))
        made = [hidden_ND.new_empty(rows * columns, dtype=torch.float32) for _ in range(tasks)]
        if accumulate:
            made += [hidden_ND.new_empty(rows, d, dtype=torch.float32) for _ in range(tasks)]
        if wide:
            made += [hidden_ND.new_empty(rows + columns, d, dtype=torch.float32) for _ in range(tasks)]
        return made


class _On:
    """A tensor's shape, said to be on another device."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, device


def planned_head(hidden_ND: Tensor, weight_VD: Tensor, device: torch.device) -> Tensor:
    """fp32 (N,) in place of `linear_logprob`, with its memory on `device`."""
    return _Head.apply(hidden_ND, weight_VD, HeadTiles(device))
