"""The elementwise passes of `linear_logprob` over one tile of logits, in Triton.

The products stay with cuBLAS. What is left is memory traffic, so each kernel reads its data once and keeps a whole row of
the tile in registers: transform, maximum, sum, optional entropy, sum of squares and argmax, and the coefficients of the
second product, written back over the logits in the dtype the product wants.

    kernel     grid   reads                 writes
    fold       rows   tile (fp32)           coefficients (2 or 4 bytes), statistics
    shrink     rows   acc (fp32)            acc, only in rows whose maximum moved
    finish     rows   h, W[target], acc     log-prob, unit gradient
    gradient   rows   tile (fp32)           gradient of the logits (2 or 4 bytes)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head_options import LogitTransform
from .head_running import Running
from .head_tiles import Tiles

# Hidden sizes are walked in steps of this many: 8 values per thread of 4 warps.
_BLOCK_D = 1024


@triton.jit
def transform(z, scale, cap, HAS_CAP: tl.constexpr):
    """Logits from products, and dz/dproduct up to its constant factor."""
    z = z * scale
    slope = z
    if HAS_CAP:
        t = 2 * tl.sigmoid(2 * z) - 1
        slope = 1 - t * t
        z = t * cap
    return z, slope


@triton.jit
def fold_kernel(
    z_ptr, bias_ptr, m_ptr, s_ptr, a_ptr, q_ptr, top_ptr, sum_ptr, shrink_ptr, moved_ptr, p_ptr, e_ptr,
    z_stride, p_stride, e_stride, columns, first, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, LOG_P2: tl.constexpr, TOP: tl.constexpr,
    MEAN: tl.constexpr, UNIT: tl.constexpr, ENTROPY_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    inside = offset < columns
    z = tl.load(z_ptr + row * z_stride + offset, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    z, slope = transform(z, scale, cap, HAS_CAP)
    if MEAN:
        tl.store(sum_ptr + row, tl.load(sum_ptr + row) + tl.sum(tl.where(inside, z, 0.0), axis=0))
    z = tl.where(inside, z, -float("inf"))
    m_old = tl.load(m_ptr + row)
    peak = tl.max(z, axis=0)
    m = tl.maximum(m_old, peak)
    moved = m_old - m
    shrink = tl.exp(moved)
    x = z - m
    p = tl.exp(x)
    s_old = tl.load(s_ptr + row)
    tl.store(m_ptr + row, m)
    tl.store(s_ptr + row, s_old * shrink + tl.sum(p, axis=0))
    tl.store(shrink_ptr + row, shrink)
    # p underflows before x * p could become -inf * 0.
    xp = tl.where(p > 0, x, 0.0) * p
    if ENTROPY:
        a = tl.load(a_ptr + row)
        tl.store(a_ptr + row, shrink * (a + moved * s_old) + tl.sum(xp, axis=0))
        tl.store(moved_ptr + row, moved)
    if LOG_P2:
        tl.store(q_ptr + row, tl.load(q_ptr + row) * shrink * shrink + tl.sum(p * p, axis=0))
    if TOP:
        here = tl.min(tl.where(z == peak, offset, BLOCK), axis=0).to(tl.int64) + first
        tl.store(top_ptr + row, tl.where(peak > m_old, here, tl.load(top_ptr + row)))
    if UNIT:
        if HAS_CAP:
            p = p * slope
        tl.store(p_ptr + row * p_stride + offset, p.to(p_ptr.dtype.element_ty), mask=inside)
    if ENTROPY_UNIT:
        if HAS_CAP:
            xp = xp * slope
        tl.store(e_ptr + row * e_stride + offset, xp.to(e_ptr.dtype.element_ty), mask=inside)


@triton.jit
def shrink_kernel(acc_ptr, shrink_ptr, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    shrink = tl.load(shrink_ptr + row)
    if shrink != 1.0:
        for start in range(0, d, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            here = acc_ptr + row * d + offset
            tl.store(here, tl.load(here, mask=offset < d, other=0.0) * shrink, mask=offset < d)


@triton.jit
def finish_kernel(
    h_ptr, w_ptr, bias_ptr, target_ptr, m_ptr, s_ptr, a_ptr, acc_ptr, acc_entropy_ptr, logprob_ptr, unit_ptr,
    entropy_unit_ptr, h_stride, w_stride, d, scale, cap, slope_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, UNIT: tl.constexpr, ENTROPY_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        h = tl.load(h_ptr + row * h_stride + offset, mask=offset < d, other=0.0).to(tl.float32)
        # rounded as the products round it (autocast)
        w = tl.load(w_ptr + target * w_stride + offset, mask=offset < d, other=0.0)
        w = w.to(h_ptr.dtype.element_ty).to(tl.float32)
        products += h * w
    z = tl.sum(products, axis=0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + target).to(tl.float32)
    z, slope = transform(z, scale, cap, HAS_CAP)
    s = tl.load(s_ptr + row)
    log_s = tl.log(s)
    logprob = z - tl.load(m_ptr + row) - log_s
    # tl.minimum would make 0 of NaN
    tl.store(logprob_ptr + row, tl.where(logprob > 0, 0.0, logprob))
    if UNIT:
        shift = 0.0
        if ENTROPY_UNIT:
            # entropy - log s, with entropy = log s - a / s
            shift = -tl.load(a_ptr + row) / s
        for start in range(0, d, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            mean = tl.load(acc_ptr + row * d + offset, mask=offset < d, other=0.0) / s
            w = tl.load(w_ptr + target * w_stride + offset, mask=offset < d, other=0.0)
            w = w.to(h_ptr.dtype.element_ty).to(tl.float32)
            if HAS_CAP:
                w = w * slope
            unit = ((w - mean) * slope_scale).to(unit_ptr.dtype.element_ty)
            tl.store(unit_ptr + row * d + offset, unit, mask=offset < d)
            if ENTROPY_UNIT:
                e = tl.load(acc_entropy_ptr + row * d + offset, mask=offset < d, other=0.0) / s
                e = (-slope_scale * (e + shift * mean)).to(entropy_unit_ptr.dtype.element_ty)
                tl.store(entropy_unit_ptr + row * d + offset, e, mask=offset < d)


@triton.jit
def gradient_kernel(
    z_ptr, bias_ptr, target_ptr, m_ptr, s_ptr, grad_ptr, entropy_ptr, grad_entropy_ptr, out_ptr, z_stride, out_stride,
    columns, first, scale, cap, slope_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    inside = offset < columns
    z = tl.load(z_ptr + row * z_stride + offset, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    z, slope = transform(z, scale, cap, HAS_CAP)
    s = tl.load(s_ptr + row)
    x = z - tl.load(m_ptr + row)
    p = tl.exp(x) / s
    grad = tl.load(grad_ptr + row)
    g = grad * (tl.where(offset + first == tl.load(target_ptr + row), 1.0, 0.0) - p)
    if ENTROPY:
        logp = tl.where(p > 0, x - tl.log(s), 0.0)
        g -= tl.load(grad_entropy_ptr + row) * p * (logp + tl.load(entropy_ptr + row))
    if HAS_CAP:
        g = g * slope
    # The whole row was read before the first store: the output may lie over the logits.
    tl.debug_barrier()
    tl.store(out_ptr + row * out_stride + offset, (g * slope_scale).to(out_ptr.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    # At most 16 values of a row per thread: more would not stay in registers.
    return max(1, min(32, block // 512))


def _cap(tr: LogitTransform) -> float:
    return 0.0 if tr.softcap is None else float(tr.softcap / tr.temperature)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    # A pointer that the kernel is compiled not to touch.
    return other if x is None else x


def fold(tiles: Tiles, h: Tensor, w: Tensor, bias: Tensor | None, tr: LogitTransform, run: Running, columns: slice,
         *, unit: bool, entropy_unit: bool) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As `head_passes_torch.fold`, in one launch."""
    z = tiles.product(h, w)
    rows, width = z.shape
    block = triton.next_power_of_2(tiles.columns)
    p = tiles.coefficients(z)
    e = p.new_empty(rows, z.stride(0))[:, :width] if entropy_unit else p
    fold_kernel[(rows,)](
        z, _or(bias, z), run.m, run.s, _or(run.a, run.m), _or(run.q, run.m), _or(run.top, run.m), _or(run.z, run.m),
        run.shrink, run.moved, p, e, z.stride(0), p.stride(0), e.stride(0), width, columns.start, tr.product_scale, _cap(tr),
        HAS_BIAS=bias is not None, HAS_CAP=tr.softcap is not None, ENTROPY=run.a is not None,
        LOG_P2=run.q is not None, TOP=run.top is not None, MEAN=run.z is not None, UNIT=unit, ENTROPY_UNIT=entropy_unit, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return (p if unit else None), (e if entropy_unit else None)


def move_products_(run: Running) -> None:
    """As `Running.move_products_`; rows whose maximum did not move are neither read nor written."""
    if run.acc is None:
        return
    rows, d = run.acc.shape
    if run.acc_entropy is not None:
        run.acc_entropy.addcmul_(run.acc, run.moved[:, None])
        shrink_kernel[(rows,)](run.acc_entropy, run.shrink, d, BLOCK=_BLOCK_D, num_warps=4)
    shrink_kernel[(rows,)](run.acc, run.shrink, d, BLOCK=_BLOCK_D, num_warps=4)


def finish(h: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target: Tensor, tr: LogitTransform, run: Running,
           dtype: torch.dtype, logprob: Tensor, unit: Tensor | None, entropy_unit: Tensor | None) -> None:  # fmt: skip
    """As `head_passes_torch.finish`, in one launch: the target's weight row is read where it lies."""
    d = h.shape[1]
    finish_kernel[(h.shape[0],)](
        h, weight_VD, _or(bias_V, run.m), target, run.m, run.s, _or(run.a, run.m), _or(run.acc, run.m),
        _or(run.acc_entropy, run.m), logprob, _or(unit, run.m), _or(entropy_unit, run.m), h.stride(0),
        weight_VD.stride(0), d, tr.product_scale, _cap(tr), tr.slope_scale, HAS_BIAS=bias_V is not None,
        HAS_CAP=tr.softcap is not None, UNIT=unit is not None, ENTROPY_UNIT=entropy_unit is not None,
        BLOCK=_BLOCK_D, num_warps=4,
    )  # fmt: skip


def gradient(tiles: Tiles, h: Tensor, w: Tensor, bias: Tensor | None, tr: LogitTransform, columns: slice,
             target: Tensor, m: Tensor, s: Tensor, grad: Tensor, entropy: Tensor | None, grad_entropy: Tensor | None,
             ) -> Tensor:  # fmt: skip
    """As `head_passes_torch.gradient`, in one launch, in the dtype of the products."""
    z = tiles.product(h, w)
    block = triton.next_power_of_2(tiles.columns)
    out = tiles.coefficients(z)
    gradient_kernel[(z.shape[0],)](
        z, _or(bias, z), target, m, s, grad, _or(entropy, m), _or(grad_entropy, m), out, z.stride(0), out.stride(0),
        z.shape[1], columns.start, tr.product_scale, _cap(tr), tr.slope_scale, HAS_BIAS=bias is not None,
        HAS_CAP=tr.softcap is not None, ENTROPY=grad_entropy is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out
