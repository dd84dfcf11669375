"""`label_logprob` in Triton.

kernel     grid                 reads                    writes
forward    rows                 logits once              3 fp32 per row
backward   rows x V / BLOCK     logits once              gradient, over the logits if they are its output
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .backends import device_of

_IGNORED = tl.constexpr(-100)
_BLOCK = 4096


@triton.jit
def label_forward_kernel(
    z_ptr, target_ptr, m_ptr, s_ptr, logprob_ptr, z_stride, columns, LOWEST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target == _IGNORED:
        tl.store(m_ptr + row, 0.0)
        tl.store(s_ptr + row, 1.0)
        tl.store(logprob_ptr + row, 0.0)
    else:
        dtype: tl.constexpr = m_ptr.dtype.element_ty
        # Each lane keeps its own maximum and sum: one reduction at the end instead of one per block.
        m = tl.full((BLOCK,), LOWEST, dtype)
        s = tl.zeros((BLOCK,), dtype)
        for start in range(0, columns, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * z_stride + offset, mask=offset < columns, other=-float("inf")).to(dtype)
            higher = tl.maximum(m, z)
            s = s * tl.exp(m - higher) + tl.exp(z - higher)
            m = higher
        peak = tl.max(m, axis=0)
        total = tl.sum(s * tl.exp(m - peak), axis=0)
        picked = tl.load(z_ptr + row * z_stride + target).to(dtype)
        tl.store(m_ptr + row, peak)
        tl.store(s_ptr + row, total)
        logprob = picked - peak - tl.log(total)
        # tl.minimum would make 0 of NaN
        tl.store(logprob_ptr + row, tl.where(logprob > 0, 0.0, logprob))


@triton.jit
def label_backward_kernel(
    z_ptr, target_ptr, m_ptr, s_ptr, grad_ptr, out_ptr, z_stride, out_stride, columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < columns
    target = tl.load(target_ptr + row)
    m = tl.load(m_ptr + row)
    z = tl.load(z_ptr + row * z_stride + offset, mask=inside, other=0.0).to(m.dtype)
    p = tl.exp(z - m) / tl.load(s_ptr + row)
    g = tl.load(grad_ptr + row) * (tl.where(offset == target, 1.0, 0.0) - p)
    g = tl.where(target == _IGNORED, 0.0, g)
    tl.store(out_ptr + row * out_stride + offset, g.to(out_ptr.dtype.element_ty), mask=inside)


def forward(logits: Tensor, target: Tensor, maximum: Tensor, total: Tensor, logprob: Tensor) -> None:
    """Fill maximum, total and logprob (N,)."""
    n, v = logits.shape
    if n:
        with device_of(logits):
            label_forward_kernel[(n,)](logits, target, maximum, total, logprob, logits.stride(0), v,
                                       LOWEST=-3.0e38, BLOCK=_BLOCK, num_warps=8)  # fmt: skip


def backward(
    logits: Tensor, target: Tensor, maximum: Tensor, total: Tensor, grad: Tensor, out: Tensor
) -> None:
    """Fill out (N, V), which may be the logits."""
    n, v = logits.shape
    if n:
        label_backward_kernel[(n, triton.cdiv(v, _BLOCK))](
            logits,
            target,
            maximum,
            total,
            grad,
            out,
            logits.stride(0),
            out.stride(0),
            v,
            BLOCK=_BLOCK,
            num_warps=8,
        )
