"""Rotary positions in few passes over queries and keys, forward and backward (`layer_passes` of the kernels).

As transformers writes them they are five passes forward and more back, over halves that are cut out, negated and put
together again. Attention modules keep transformers' own forward; only the function that it calls by name is another, and only
where transformers' function reads as Llama's does. transformers itself is not changed.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fasttrain.model.fused_layers import same_source
from fasttrain_kernels import rotary

ROTARY, HALF = "apply_rotary_pos_emb", "rotate_half"
Rotary = Callable[..., tuple[Tensor, Tensor]]


def _fused(theirs: Rotary) -> Rotary:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not all(_covered(x, cos, sin) for x in (q, k)):
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply_rotary_pos_emb


def _covered(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the result has x's shape and dtype, and only x may want a gradient."""
    size = x.shape[-1]
    return (
        size % 2 == 0
        and cos.shape[-1] == sin.shape[-1] == size
        and cos.dtype == sin.dtype == x.dtype
        and not (cos.requires_grad or sin.requires_grad)
    )


def fuse_rotary(decoder: nn.Module) -> int:
    """Let attention modules that rotate as Llama's do call the fused function; how many do.

    Their class becomes a subclass of itself, whose forward is the same code with one name bound otherwise.
    """
    fused = 0
    made: dict[type, type | None] = {}
    for module in decoder.modules():
        kind = type(module)
        if kind not in made:
            forward = _with_fused_rotary(kind.forward)
            made[kind] = forward and type(kind.__name__, (kind,), {"forward": forward})
        if (other := made[kind]) is not None:
            module.__class__ = other
            fused += 1
    return fused


def _with_fused_rotary(forward: Any) -> types.FunctionType | None:
    """forward with the fused function under the name of transformers'; None where it calls none or an unknown one."""
    called = inspect.unwrap(forward)
    if not isinstance(called, types.FunctionType) or ROTARY not in called.__code__.co_names:
        return None
    names = called.__globals__
    if not all(same_source(names.get(name), getattr(modeling_llama, name)) for name in (ROTARY, HALF)):
        return None
    mine = _copy(called, {**names, ROTARY: _fused(names[ROTARY])}, called.__closure__)
    return _rewrapped(forward, called, mine)


def _rewrapped(outer: Any, inner: types.FunctionType, mine: types.FunctionType) -> types.FunctionType | None:
    """The decorators around inner, which hold what they call in a closure, around mine; None for others."""
    if outer is inner:
        return mine
    held = outer.__wrapped__
    wrapped = _rewrapped(held, inner, mine)
    if wrapped is None or not isinstance(outer, types.FunctionType):
        return None
    cells = outer.__closure__ or ()
    holding = [_holds(cell, held) for cell in cells]
    if not any(holding):
        return None
    new = (types.CellType(wrapped) if holds else cell for cell, holds in zip(cells, holding))
    again = _copy(outer, outer.__globals__, tuple(new))
    again.__dict__["__wrapped__"] = wrapped
    return again


def _holds(cell: types.CellType, held: Any) -> bool:
    try:
        return cell.cell_contents is held
    except ValueError:  # an empty cell
        return False


def _copy(
    function: types.FunctionType, names: dict[str, Any], closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(copied, name, getattr(function, name))
    return copied
