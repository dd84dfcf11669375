"""Shared-prefix attention on torch's FlexAttention: a block mask from the layout, one compiled kernel for all packs.

A row sees at most two runs of keys: its own segment up to itself, and the prompt before it. Their ends, four numbers a
row, are all that the mask reads. A block of 128 x 128 pairs is skipped, done whole or done with the mask, as the count of
its visible pairs says; the tables are made on the device, without waiting for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .shared_prefix import SharedPrefixLayout
from .shared_prefix_parts import Scores

BLOCK = 128


def flex(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scores: Scores, window: int | None, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    """q (1, H, T, K), k and v (1, Hkv, T, K) -> (1, H, T, K), in memory (1, T, H, K)."""
    mask = block_mask(layout, window, q.device)
    bend = None if scores.softcap is None else _softcap(scores.softcap)
    out = compiled()(
        q, k, v, score_mod=bend, block_mask=mask, scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True), kernel_options=kernel_options(q),
    )  # fmt: skip
    if sinks is not None:
        out, aux = out
        out = (out * torch.sigmoid(aux.lse - sinks[:, None])[..., None]).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


# Bytes of shared memory that a block of an A100 has, for which torch chooses tiles; those of GeForce and RTX cards, A10 and
# L40S have 99 KiB, a T4's 64
_AMPLE, _LITTLE = 160 << 10, 96 << 10


def kernel_options(q: Tensor) -> dict[str, int | bool] | None:
    """Smaller tiles than torch's own where a block has too little shared memory for those; None elsewhere.

    With heads of 128 in 16 bits torch's fit into 99 KiB by 3 KiB, of which what our mask reads takes 4: nothing is compiled then.
    """
    if q.device.type != "cuda":
        return None
    # AMD's GPUs do not say: torch chooses for them in another way
    shared = getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", _AMPLE)
    size, narrow = q.shape[-1], q.dtype.itemsize == 2
    if shared >= _AMPLE:
        return None
    if shared >= _LITTLE and size <= 128:
        return {"fwd_num_stages": 2 if narrow else 1}
    # the kernel for few queries would take these tiles without the checks of bounds that they need
    small: dict[str, int | bool] = {"FORCE_USE_FLEX_ATTENTION": True, "fwd_BLOCK_M": 32, "fwd_num_stages": 1}
    small["fwd_BLOCK_N"] = 32 if narrow else 16
    if narrow and size <= 256:  # beside that torch's are the smallest there are
        small |= {f"bwd_BLOCK_{name}": 32 for name in ("M1", "N1", "M2", "N2")} | {"bwd_num_stages": 1}
    return small


@functools.cache
def compiled() -> Callable[..., Any]:
    """FlexAttention compiled for any number of tokens: heads and head size are fixed in it, lengths are not.

    Packs of at most one block have a compilation of their own, and so have passes with and without gradients.
    """
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _softcap(cap: float) -> Callable[..., Tensor]:
    def bend(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return bend


def visible_runs(layout: SharedPrefixLayout, window: int | None, device: torch.device) -> Tensor:
    """int32 (4, T): every row's own keys [r0, r1) and its prompt's keys [r2, r3), as rows of the pack."""

    def make() -> Tensor:
        reach = layout.longest() if window is None else window
        runs = []
        row = 0
        for (prompt, lengths), spans in zip(layout.groups, layout.spans(), strict=True):
            own = torch.arange(row, row + prompt)
            end = own + 1
            for a, b in spans:
                end[a:b] = row + b
            nothing = torch.zeros(prompt, dtype=torch.int64)
            runs.append(torch.stack([(own + 1 - reach).clamp_(min=row), end, nothing, nothing]))
            own_start = row + prompt
            for length in lengths:
                own = torch.arange(own_start, own_start + length)
                seen = row + (torch.arange(prompt, prompt + length) + 1 - reach).clamp_(0, prompt)
                runs.append(
                    torch.stack(
                        [
                            (own + 1 - reach).clamp_(min=own_start),
                            own + 1,
                            seen,
                            torch.full_like(own, row + prompt),
                        ]
                    )
                )
                own_start += length
            row = own_start
        return torch.cat(runs, 1).to(torch.int32)

    on_cpu = layout.cached(("runs", window, "cpu"), make)
    runs: Tensor = layout.cached(("runs", window, str(device)), lambda: on_cpu.to(device, non_blocking=True))
    return runs


def block_mask(layout: SharedPrefixLayout, window: int | None, device: torch.device) -> BlockMask:
    """The layout's block mask, made once per window and device."""
    window = layout.binding_window(window)
    mask: BlockMask = layout.cached(
        ("block mask", window, str(device)), lambda: _block_mask(visible_runs(layout, window, device))
    )
    return mask


def _block_mask(runs: Tensor) -> BlockMask:
    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ((kv >= runs[0, q]) & (kv < runs[1, q])) | ((kv >= runs[2, q]) & (kv < runs[3, q]))

    tokens = runs.shape[1]
    count = _pairs(runs)
    full = count == BLOCK * BLOCK
    partial, partial_keys = _table((count > 0) & ~full)
    whole, whole_keys = _table(full)
    return BlockMask.from_kv_blocks(
        partial, partial_keys, whole, whole_keys, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(tokens, tokens)
    )  # fmt: skip


def _pairs(runs: Tensor) -> Tensor:
    """Visible pairs of each block of rows with each block of keys, (blocks, blocks)."""
    tokens = runs.shape[1]
    blocks = -(-tokens // BLOCK)
    edge = torch.arange(0, blocks * BLOCK, BLOCK, device=runs.device, dtype=runs.dtype)[None, :]
    seen = runs.new_zeros(blocks * BLOCK, blocks)
    for start, end in ((runs[0], runs[1]), (runs[2], runs[3])):
        seen[:tokens] += (end[:, None].clamp(max=edge + BLOCK) - start[:, None].clamp(min=edge)).clamp_(min=0)
    return seen.view(blocks, BLOCK, blocks).sum(1)


def _table(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number (1, 1, blocks) and indices (1, 1, blocks, blocks), int32, of the chosen blocks of keys, in order."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()
