"""What a decoder does between its matrix products, in one pass each way: RMS norm, gated activations, rotary positions.

    rms_norm         y = (x s) w, s = 1 / sqrt(mean(x^2) + eps)             dx = s (g w) - x s^3 mean(g w x)
    swiglu, geglu    y = a up, a = gate sigmoid(t), t = t(gate)             dgate = g up (a / gate + a (1 - sigmoid(t)) t')
    rotary           y = x cos + rotate_half(x) sin                         dx = g cos - rotate_half(g sin)

with t = gate for SiLU and t = sqrt(8 / pi) (gate + 0.044715 gate^3) for GELU's tanh form.

Written out, a norm is four passes forward and about eight back and keeps three tensors, a gated activation keeps four, rotary
positions are five passes. Here a norm keeps its input and a number a row, an activation its two inputs, rotary positions cos and sin.
Triton makes each a single pass on CUDA; the torch backend takes a few. Weights are frozen: norm weight, cos and sin get no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import check_tensors, no_autocast, outside_graphs, resolve_backend
from .once_differentiable import once_differentiable

# Longest row of a norm in the Triton backend, which holds it in registers.
LONGEST_ROW = 32768


def rms_norm_ref(x: Tensor, weight_D: Tensor, eps: float, one_plus: bool = False) -> Tensor:
    """The definition, in x's dtype."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + weight_D if one_plus else weight_D)


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in the dtype of the inputs."""
    return gate * gate.sigmoid() * up


def geglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in the dtype of the inputs."""
    return gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, in x's dtype."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale(wide: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of every row of x, (..., 1)."""
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, one_plus: bool, backend: str) -> Tensor:
        if backend == "triton":
            from .layer_passes_triton import norm

            x = x.contiguous()
            out, scale = norm(x, weight_D, eps, one_plus)
        else:
            wide = _wide(x)
            scale = _scale(wide, eps)
            if one_plus:
                out = (wide * scale).mul_(1 + _wide(weight_D)).to(x.dtype)
            else:
                out = (wide * scale).to(x.dtype).mul_(weight_D)
        ctx.save_for_backward(x, weight_D, scale)
        ctx.one_plus, ctx.backend = one_plus, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale = ctx.saved_tensors
        if ctx.backend == "triton":
            from .layer_passes_triton import norm_backward

            return norm_backward(x, weight_D, scale, grad.contiguous(), ctx.one_plus), None, None, None, None
        wide, dx = _wide(x), _wide(grad) * (1 + _wide(weight_D) if ctx.one_plus else weight_D)
        with no_autocast(x.device):
            along = torch.linalg.vecdot(dx, wide).unsqueeze(-1)
        dx.mul_(scale).addcmul_(wide, along * scale**3, value=-1 / x.shape[-1])
        return dx.to(x.dtype), None, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool, backend: str) -> Tensor:
        if backend == "triton":
            from .layer_passes_triton import gated

            gate, up = gate.contiguous(), up.contiguous()
            out = gated(gate, up, gelu)
        else:
            out = _activation(gate, gelu).mul_(up)
        ctx.save_for_backward(gate, up)
        ctx.gelu, ctx.backend = gelu, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if ctx.backend == "triton":
            from .layer_passes_triton import gated_backward

            return *gated_backward(gate, up, grad.contiguous(), ctx.gelu), None, None
        back = grad * up
        aten = torch.ops.aten
        back = (
            aten.gelu_backward(back, gate, approximate="tanh") if ctx.gelu else aten.silu_backward(back, gate)
        )
        return back, _activation(gate, ctx.gelu).mul_(grad), None, None


def _activation(x: Tensor, gelu: bool) -> Tensor:
    return F.gelu(x, approximate="tanh") if gelu else F.silu(x)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        if backend == "triton":
            from .layer_passes_triton import rotate

            return rotate(x, cos, sin, backward=False)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if ctx.backend == "triton":
            from .layer_passes_triton import rotate

            return rotate(grad, cos, sin, backward=True), None, None, None
        half = grad.shape[-1] // 2
        dx = grad * cos
        dx[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return dx, None, None, None


@outside_graphs("rms_norm runs its own kernels")
def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float, *, one_plus: bool = False, backend: str | None = None
) -> Tensor:
    """x scaled to root mean square 1 along its last axis, times a frozen weight: x's shape and dtype.

    As Llama's norm does: statistics in fp32, the scaled row rounded to x's dtype, then the product with the weight. With
    one_plus as Gemma's does: times 1 + weight, all in fp32, rounded at the end.

    Args:
        x: (..., D) fp32, bf16, fp16 or fp64.
        weight_D: (D,), x's dtype; it gets no gradient, and is refused where one would be lost.
        eps: added to the mean square.
        backend: "torch", "triton" (D up to 32,768, not fp64) or None for the one that fits x's device.

    ValueError names the argument, what was wanted and what came.
    """
    _check_floating("rms_norm", "x", x)
    _check_like("rms_norm", "weight_D", weight_D, x, x.shape[-1:])
    return _RmsNorm.apply(
        x, weight_D, float(eps), one_plus, _backend("rms_norm", backend, x, _why_no_norm(x))
    )


@outside_graphs("swiglu runs its own kernels")
def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, differentiable in both: their shape and dtype.

    Args:
        gate, up: of one shape (..., F) and dtype: fp32, bf16, fp16 or fp64.
        backend: "torch", "triton" (not fp64) or None for the one that fits gate's device.

    ValueError names the argument, what was wanted and what came.
    """
    return _gated("swiglu", gate, up, backend)


@outside_graphs("geglu runs its own kernels")
def geglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """gelu(gate) * up with GELU's tanh form, as Gemma has it; the rest as `swiglu`."""
    return _gated("geglu", gate, up, backend)


def _gated(operation: str, gate: Tensor, up: Tensor, backend: str | None) -> Tensor:
    _check_floating(operation, "gate", gate)
    _check_like(operation, "up", up, gate, gate.shape, frozen=False)
    return _Gated.apply(
        gate, up, operation == "geglu", _backend(operation, backend, gate, _why_no_triton(gate))
    )


@outside_graphs("rotary runs its own kernels")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """x cos + rotate_half(x) sin, differentiable in x: x's shape and dtype. rotate_half puts (-x_2, x_1) for halves (x_1, x_2).

    Args:
        x: (..., K) with K even, for instance (B, H, T, K), of any strides.
        cos, sin: broadcast to x, last axis K, x's dtype; they get no gradient, as above.
        backend: "torch", "triton" (x of four axes, cos and sin alike for all heads, axis 1 or 2; not fp64) or None for the
            one that fits.

    ValueError names the argument, what was wanted and what came.
    """
    _check_floating("rotary", "x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"rotary: x: wanted an even last axis, got {tuple(x.shape)}")
    for name, part in (("cos", cos), ("sin", sin)):
        _check_like("rotary", name, part, x, None)
        if part.shape[-1:] != x.shape[-1:] or not _broadcasts(part, x):
            raise ValueError(
                f"rotary: {name}: wanted a shape that broadcasts to {tuple(x.shape)}, got {tuple(part.shape)}"
            )
    return _Rotary.apply(x, cos, sin, _backend("rotary", backend, x, _why_no_rotary(x, cos, sin)))


def _broadcasts(part: Tensor, x: Tensor) -> bool:
    return part.dim() <= x.dim() and all(a in (1, b) for a, b in zip(part.shape[::-1], x.shape[::-1]))


def _backend(operation: str, name: str | None, x: Tensor, why_not: str | None) -> str:
    """What runs; why_not: what keeps Triton from it."""
    chosen = resolve_backend(name, x, operation)
    if chosen == "triton" and why_not:
        if name == "triton":
            raise ValueError(f"{operation}: backend: 'triton' wants {why_not}")
        return "torch"
    return chosen


def _why_no_triton(x: Tensor) -> str | None:
    return "fp32, bf16 or fp16, got fp64" if x.dtype == torch.float64 else None


def _why_no_norm(x: Tensor) -> str | None:
    if x.shape[-1] > LONGEST_ROW:
        return f"rows of at most {LONGEST_ROW}, got {x.shape[-1]}"
    return _why_no_triton(x)


def _why_no_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if x.dim() != 4 or cos.dim() != 4 or cos.shape != sin.shape or 1 not in cos.shape[1:3]:
        return (
            "four axes, and cos and sin that are alike for all heads, got "
            f"{tuple(x.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return _why_no_triton(x)


def _check_floating(operation: str, name: str, x: Tensor) -> None:
    check_tensors(operation, **{name: x})
    if not x.is_floating_point():
        raise ValueError(f"{operation}: {name}: wanted a floating dtype, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{operation}: {name}: wanted at least one axis, got none")


def _check_like(
    operation: str, name: str, given: Tensor, x: Tensor, shape: torch.Size | None, frozen: bool = True
) -> None:
    def refuse(wanted: object, got: object) -> None:
        raise ValueError(f"{operation}: {name}: wanted {wanted}, got {got}")

    check_tensors(operation, **{name: given})
    if shape is not None and given.shape != shape:
        refuse(f"shape {tuple(shape)}", tuple(given.shape))
    if given.dtype != x.dtype:
        refuse(x.dtype, given.dtype)
    if given.device != x.device:
        refuse(f"device {x.device}", given.device)
    if frozen and given.requires_grad and torch.is_grad_enabled():
        refuse("a tensor that wants no gradient", "requires_grad=True")
