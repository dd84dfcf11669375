"""RMS norms and gated MLPs of frozen decoders in few passes over the activations, both ways (`layer_passes` of the kernels).

A norm keeps its input and a number per row for its backward, an MLP gate and up; what is made of them says how to make it again,
so that the linears behind them need not keep them. The modules stay transformers' own: only their class changes, and only
where the formula is known.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fasttrain.model.remade import remade
from fasttrain_kernels import geglu, rms_norm, swiglu

NORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Norm(nn.Module):
    """Mixed into transformers' norm by `fuse_layers`."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _frozen_alike(self.weight, hidden_states):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        make = functools.partial(rms_norm, eps=self.variance_epsilon)
        return remade(make(hidden_states, self.weight), make, hidden_states, self.weight)


class _OnePlusNorm(nn.Module):
    """The same for norms whose factor is 1 + weight."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not _frozen_alike(self.weight, x):
            return super().forward(x)  # type: ignore[no-any-return]
        make = functools.partial(rms_norm, eps=self.eps, one_plus=True)
        return remade(make(x, self.weight), make, x, self.weight)


def _frozen_alike(weight: Tensor, x: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype in NORM_DTYPES and not weight.requires_grad


class _Mlp(nn.Module):
    """Mixed into transformers' MLP by `fuse_layers`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = _PRODUCTS[type(self.act_fn)]
        out: Tensor = self.down_proj(remade(product(gate, up), product, gate, up))
        return out


_PRODUCTS = {SiLUActivation: swiglu, nn.SiLU: swiglu, GELUTanh: geglu}


def fuse_layers(decoder: nn.Module) -> int:
    """Swap in the fused forwards where the module is of a known class; how many there were.

    Known are the classes whose forward reads as Llama's or Gemma's does: transformers copies them from family to family.
    """
    fused = 0
    made: dict[type, type] = {}
    for module in decoder.modules():
        kind: Any = type(module)
        mixed: type
        if reads_like(kind, LlamaRMSNorm):
            mixed = _Norm
        elif reads_like(kind, GemmaRMSNorm) and same_source(kind._norm, GemmaRMSNorm._norm):
            mixed = _OnePlusNorm
        elif reads_like(kind, LlamaMLP) and type(getattr(module, "act_fn", None)) in _PRODUCTS:
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
    except (
        OSError,
        TypeError,
        SyntaxError,
        ValueError,
        StopIteration,
    ):  # made at run time, built in, or no `def`
        return False


def _code(function: Callable[..., Any]) -> str:
    if isinstance(function, nn.Module):  # what the `kernels` package makes of a decorated function
        cells = type(function).forward.__closure__ or ()
        function = next(cell.cell_contents for cell in cells if inspect.isfunction(cell.cell_contents))
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
