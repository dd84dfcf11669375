"""RMS norm, gated activations and rotary positions in Triton: each one pass over its tensors, fp32 inside.

kernel            grid                          reads               writes
norm              rows / ROWS                   x                   y, a number a row
norm backward     rows / ROWS                   x, g                dx
gated             elements / BLOCK              gate, up            y
gated backward    elements / BLOCK              gate, up, g         dgate, dup
rotary            tokens x heads / BLOCK_H      x (or g), cos, sin  y (or dx)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import device_of

# Elements of a tile of several short rows; of an activation, whose programs may be more than a grid's second axis takes; of one
# token's heads.
_TILE = 2048
_BLOCK = 1024
_HALVES = 1024


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x_ptr, weight_ptr, out_ptr, scale_ptr, rows, columns, eps,
    ONE_PLUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / columns + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    scaled = wide * scale[:, None]
    if ONE_PLUS:
        weight += 1
    else:
        scaled = scaled.to(x.dtype).to(tl.float32)
    tl.store(out_ptr + place, (scaled * weight[None, :]).to(x.dtype), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    x_ptr, weight_ptr, scale_ptr, grad_ptr, out_ptr, rows, columns,
    ONE_PLUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if ONE_PLUS:
        weight += 1
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32) * weight[None, :]
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    along = tl.sum(grad * x, axis=1) / columns * scale * scale
    dx = (grad - x * along[:, None]) * scale[:, None]
    tl.store(out_ptr + place, dx.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation(x, GELU: tl.constexpr):
    """sigmoid(t) and dt/dx: SiLU and the tanh form of GELU are both x sigmoid(t)."""
    if GELU:
        # 2 sqrt(2 / pi) (x + 0.044715 x^3)
        t = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        t = x
        slope = x * 0 + 1
    return tl.sigmoid(t), slope


@triton.jit
def gated_kernel(gate_ptr, up_ptr, out_ptr, elements, GELU: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0)
    up = tl.load(up_ptr + place, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    sigmoid, _ = activation(wide, GELU)
    # rounded before the product, as torch's activations round
    active = (wide * sigmoid).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + place, (active * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def gated_backward_kernel(
    gate_ptr, up_ptr, grad_ptr, gate_grad_ptr, up_grad_ptr, elements, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid, slope = activation(gate, GELU)
    steep = sigmoid * (1 + gate * (1 - sigmoid) * slope)
    dtype: tl.constexpr = gate_grad_ptr.dtype.element_ty
    tl.store(gate_grad_ptr + place, (grad * up * steep).to(dtype), mask=inside)
    tl.store(up_grad_ptr + place, (grad * gate * sigmoid).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens, heads, half, x_batch, x_head, x_token, out_batch, out_head, out_token,
    cos_batch, cos_token, sin_batch, sin_token, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64) // tokens
    token = tl.program_id(0).to(tl.int64) % tokens
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    cos_place = cos_ptr + batch * cos_batch + token * cos_token + k
    sin_place = sin_ptr + batch * sin_batch + token * sin_token + k
    cos_1 = tl.load(cos_place, mask=k < half, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_place + half, mask=k < half, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_place, mask=k < half, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_place + half, mask=k < half, other=0.0).to(tl.float32)[None, :]
    inside = (head < heads)[:, None] & (k < half)[None, :]
    x_place = x_ptr + batch * x_batch + token * x_token + head[:, None] * x_head + k[None, :]
    x_1 = tl.load(x_place, mask=inside, other=0.0).to(tl.float32)
    x_2 = tl.load(x_place + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        y_1 = x_1 * cos_1 + x_2 * sin_2
        y_2 = x_2 * cos_2 - x_1 * sin_1
    else:
        y_1 = x_1 * cos_1 - x_2 * sin_1
        y_2 = x_2 * cos_2 + x_1 * sin_2
    out_place = out_ptr + batch * out_batch + token * out_token + head[:, None] * out_head + k[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_place, y_1.to(dtype), mask=inside)
    tl.store(out_place + half, y_2.to(dtype), mask=inside)


def tile(columns: int) -> dict[str, int]:
    """How a norm's rows of this length are shared out: whole rows to a program, short ones several at once."""
    block = triton.next_power_of_2(columns)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(32, max(4, rows * block // 512))}


def norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
    """Normed x (..., D), contiguous as x is, and the factor of every row, (..., 1) fp32."""
    columns = x.shape[-1]
    out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rows = scale.numel()
    if out.numel():
        shares = tile(columns)
        with device_of(x):
            norm_kernel[(triton.cdiv(rows, shares["ROWS"]),)](
                x, weight.contiguous(), out, scale, rows, columns, eps, ONE_PLUS=one_plus, **shares
            )
    return out, scale


def norm_backward(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, one_plus: bool) -> Tensor:
    """The gradient of x."""
    columns, out = x.shape[-1], torch.empty_like(x)
    rows = scale.numel()
    if out.numel():
        shares = tile(columns)
        norm_backward_kernel[(triton.cdiv(rows, shares["ROWS"]),)](
            x, weight.contiguous(), scale, grad, out, rows, columns, ONE_PLUS=one_plus, **shares
        )
    return out


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) up or gelu(gate) up, of contiguous tensors."""
    out = torch.empty_like(gate)
    if out.numel():
        with device_of(gate):
            gated_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
                gate, up, out, out.numel(), GELU=gelu, BLOCK=_BLOCK, num_warps=4
            )
    return out


def gated_backward(gate: Tensor, up: Tensor, grad: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        gated_backward_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](
            gate, up, grad, gate_grad, up_grad, gate.numel(), GELU=gelu, BLOCK=_BLOCK, num_warps=4
        )
    return gate_grad, up_grad


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """x (B, H, T, K) or (B, T, H, K) turned by cos and sin, of which the heads' axis is 1, or turned back; laid out as x is."""
    x, cos, sin = (one if one.stride(-1) == 1 else one.contiguous() for one in (x, cos, sin))
    out = torch.empty_like(x)
    if not out.numel():
        return out
    head = 1 if cos.shape[1] == 1 else 2
    token = 3 - head
    batches, heads, tokens, half = x.shape[0], x.shape[head], x.shape[token], x.shape[-1] // 2
    wanted = [*x.shape]
    wanted[head] = 1
    cos, sin = cos.expand(wanted), sin.expand(wanted)
    block = triton.next_power_of_2(half)
    block_h = max(1, min(triton.next_power_of_2(heads), _HALVES // block))
    with device_of(x):
        rotary_kernel[(batches * tokens, triton.cdiv(heads, block_h))](
            x, cos, sin, out, tokens, heads, half, x.stride(0), x.stride(head), x.stride(token),
            out.stride(0), out.stride(head), out.stride(token), cos.stride(0), cos.stride(token),
            sin.stride(0), sin.stride(token), BACKWARD=backward, BLOCK_H=block_h, BLOCK_K=block, num_warps=4,
        )  # fmt: skip
    return out
