"""Counts the floating-point operations that run, attention included: torch's own counter does not know the CPU's flash kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def visible(queries: int, keys: int, causal: bool) -> int:
    """(query, key) pairs of one head; causal is aligned top-left, as torch's is."""
    if not causal:
        return queries * keys
    square = min(queries, keys)
    return square * (square + 1) // 2 + (queries - square) * keys


def _attention(q: Any, k: Any, causal: bool) -> int:
    batch, heads, rows, size = q
    return 2 * batch * heads * visible(rows, k[2], causal) * size


def _forward(q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return 2 * _attention(q, k, is_causal)  # scores, and their product with v


def _backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout: float, is_causal: bool, **_: Any
) -> int:
    return 5 * _attention(q, k, is_causal)  # scores again, dv, dp, dq, dk


def _added_product(out: Any, left: Any, right: Any, **_: Any) -> int:
    """A product added in place, which torch's counter passes over; ours are most of LoRA's backward."""
    return 2 * left[0] * left[1] * right[1]


def counter() -> FlopCounterMode:
    """A FlopCounterMode that counts visible pairs of attention, forward and backward, and products added in place."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
            aten.addmm_: _added_product,
        },
    )
