"""Merging a part of an attention into the rest by their log-sum-exps, in place; in Triton on CUDA.

l = logaddexp(l_A, l_B)        o = o_A exp(l_A - l) + o_B exp(l_B - l)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import interpreting, triton_installed
from .shared_prefix_plan import Gather, Slice


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Of log-sum-exps and sums: fp32, or fp64 where the inputs are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, rows: Any, o: Tensor, l_part: Tensor) -> None:
    """Merge a part's (1, H, M, K) and (1, H, M) into the rows of out (1, H, T, K) and lse (1, H, T), in place."""
    if triton_installed() and (out.is_cuda or interpreting()) and isinstance(rows, Slice | Gather):
        from .shared_prefix_merge_triton import merge_rows_

        index = rows.rows if isinstance(rows, Gather) else None
        merge_rows_(out[0], lse[0], rows.start if isinstance(rows, Slice) else 0, index, o[0], l_part[0])
        return
    whole, whole_lse = rows.take(out), rows.take(lse)
    merge_ref_(whole, whole_lse, o, l_part)
    if isinstance(rows, Gather):
        rows.put(out, whole)
        rows.put(lse, whole_lse)


def merge_ref_(out: Tensor, lse: Tensor, o: Tensor, l_part: Tensor) -> None:
    """The definition, in the precision of the log-sum-exps; shapes are equal."""
    share = torch.sigmoid(l_part - lse)[..., None]
    if out.dtype == share.dtype == o.dtype:
        out.lerp_(o, share)
    else:
        out.copy_(torch.lerp(out.to(share.dtype), o.to(share.dtype), share))
    torch.logaddexp(lse, l_part, out=lse)
