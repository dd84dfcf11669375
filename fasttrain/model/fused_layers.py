"""RMS norm and SwiGLU of frozen decoders in few passes over the activations, forward and backward.

As transformers writes them, a norm is four passes forward and about eight back, and autograd keeps three tensors for it;
SwiGLU keeps four. Here a norm keeps its input and a number per row, SwiGLU its two inputs; their outputs say how to make them
again, so that the linears behind them need not keep them. The modules stay transformers' own: only their class changes, and
only where the formula is known.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fasttrain.model.remade import remade

NORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _scale(wide: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of every row of fp32 x, (..., 1)."""
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Statistics in fp32, the weight applied in x's dtype, as transformers does."""
    wide = x.float()
    return (wide * _scale(wide, eps)).to(x.dtype).mul_(weight_D)


def _silu_times(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class _RmsNorm(torch.autograd.Function):
    """x (..., D) scaled to root mean square 1, times weight (D,), which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = _scale(wide, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (wide * scale).to(x.dtype).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight_D, scale = ctx.saved_tensors
        wide, dx = x.float(), grad.float() * weight_D
        along = torch.linalg.vecdot(dx, wide).unsqueeze(-1)
        dx.mul_(scale).addcmul_(wide, along * scale**3, value=-1 / x.shape[-1])
        return dx.to(x.dtype), None, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up; the two inputs are kept, nothing between."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _silu_times(gate, up)

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
        dtype = hidden_states.dtype
        if dtype == self.weight.dtype and dtype in NORM_DTYPES and not self.weight.requires_grad:
            out = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
            make = functools.partial(_normed, eps=self.variance_epsilon)
            return remade(out, make, hidden_states, self.weight)
        out = super().forward(hidden_states)
        return out


class _Mlp(nn.Module):
    """Mixed into transformers' MLP by `fuse_layers`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor = self.down_proj(remade(_SwiGlu.apply(gate, up), _silu_times, gate, up))
        return out


def fuse_layers(decoder: nn.Module) -> int:
    """Swap in the fused forwards where the module is of a known class; how many there were.

    Known are the classes whose forward reads as Llama's does: transformers copies it from family to family.
    """
    fused = 0
    made: dict[type, type] = {}
    for module in decoder.modules():
        kind = type(module)
        mixed: type
        if reads_like(kind, LlamaRMSNorm):
            mixed = _Norm
        elif reads_like(kind, LlamaMLP) and isinstance(getattr(module, "act_fn", None), SiLUActivation):
            mixed = _Mlp
        else:
            continue
        if kind not in made:
            made[kind] = type(kind.__name__, (mixed, kind), {})
        module.__class__ = made[kind]
        fused += 1
    return fused


def reads_like(kind: Any, model: Any) -> bool:
    """Whether two classes have the same source of forward."""
    return same_source(kind.forward, model.forward)


@functools.cache
def same_source(mine: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions are the same code, annotations, comments, docstrings and names of hub kernels aside."""
    try:
        return _code(mine) == _code(other)
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time, built in, or no `def`
        return False


def _code(function: Callable[..., Any]) -> str:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if not isinstance(definition, ast.FunctionDef):
        raise TypeError(f"{function} is not written as a def")
    given = definition.args
    for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
        if argument is not None:
            argument.annotation = None
    definition.returns = None
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    definition.decorator_list = [
        one
        for one in definition.decorator_list
        if not ast.unparse(one).startswith("use_kernel_forward_from_hub")
    ]
    return ast.unparse(definition)
