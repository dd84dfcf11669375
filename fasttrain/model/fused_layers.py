"""RMS norm and SwiGLU of frozen fp32 decoders in few passes over the activations, forward and backward.

As transformers writes them, a norm is four passes forward and about eight back, and autograd keeps three tensors for it;
SwiGLU keeps four. Here a norm keeps its input and a number per row, SwiGLU its two inputs. The modules stay transformers' own:
only their class changes, and only where the formula is known.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

# x / sqrt(mean(x^2) + eps) * weight, and down(silu(gate(x)) * up(x)), whatever the family calls them.
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


class _RmsNorm(torch.autograd.Function):
    """x (..., D) scaled to root mean square 1, times weight (D,), which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight_D, scale = ctx.saved_tensors
        dx = grad * weight_D
        along = torch.linalg.vecdot(dx, x).unsqueeze(-1)
        return dx.mul_(scale).addcmul_(x, along * scale**3, value=-1 / x.shape[-1]), None, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up; the two inputs are kept, nothing between."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _Norm(nn.Module):
    """Mixed into transformers' norm by `fuse_layers`."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor
        if hidden_states.dtype == self.weight.dtype == torch.float32 and not self.weight.requires_grad:
            out = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
            return out
        out = super().forward(hidden_states)
        return out


class _Mlp(nn.Module):
    """Mixed into transformers' MLP by `fuse_layers`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(_SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))
        return out


def fuse_layers(decoder: nn.Module) -> int:
    """Swap in the fused forwards where the module is of a known class; how many there were."""
    fused = 0
    made: dict[type, type] = {}
    for module in decoder.modules():
        kind = type(module)
        mixed: type
        if kind.__name__ in NORMS:
            mixed = _Norm
        elif kind.__name__ in MLPS and isinstance(getattr(module, "act_fn", None), SiLUActivation):
            mixed = _Mlp
        else:
            continue
        if kind not in made:
            made[kind] = type(kind.__name__, (mixed, kind), {})
        module.__class__ = made[kind]
        fused += 1
    return fused
