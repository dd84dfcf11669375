"""The moments of bitsandbytes' 8-bit AdamW as fp32, and back: with the scales they had, to the same bits.

A moment is a byte per element, which names one of 256 values of a map, and a scale per block of 256 elements. Blocks are those of
the tensor that the optimizer sees: a whole parameter, or under ZeRO this rank's flat part of many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
_NUMBERS = {"exp_avg": "1", "exp_avg_sq": "2"}  # bitsandbytes' state1, qmap1, absmax1
_BLOCK = 256
_AT_A_TIME = _BLOCK << 14


def widen(state: Mapping[str, Any], moment: str) -> Tensor:
    """The moment in fp32, in the shape of its codes; the state's own tensor where it is small and fp32 already."""
    number = _NUMBERS[moment]
    code: Tensor = state[f"state{number}"]
    if code.dtype == torch.float32:
        return code
    out = torch.empty(code.shape, dtype=torch.float32, device=code.device)
    scales = state[f"absmax{number}"].split(_AT_A_TIME // _BLOCK)
    for part, codes, scale in zip(out.view(-1).split(_AT_A_TIME), code.view(-1).split(_AT_A_TIME), scales):
        each = scale.repeat_interleave(_BLOCK)[: len(codes)]
        torch.mul(state[f"qmap{number}"][codes.int()], each, out=part)
    return out


def narrow(state: dict[str, Any], moment: str, value: Tensor, scales: Tensor | None = None) -> None:
    """Write an fp32 moment into the state's codes; `scales` are those it was widened with, else each block's largest."""
    number = _NUMBERS[moment]
    code: Tensor = state[f"state{number}"]
    if code.dtype == torch.float32:
        code.copy_(value.view_as(code))
        return
    qmap: Tensor = state[f"qmap{number}"]
    middles = (qmap[1:] + qmap[:-1]) / 2
    kept: Tensor = state[f"absmax{number}"]
    parts = value.to(code.device).reshape(-1).split(_AT_A_TIME)
    for index, (part, codes) in enumerate(zip(parts, code.view(-1).split(_AT_A_TIME))):
        blocks = torch.nn.functional.pad(part, (0, -len(part) % _BLOCK)).view(-1, _BLOCK)
        first = index * (_AT_A_TIME // _BLOCK)
        scale = kept[first : first + len(blocks)]
        scale.copy_(blocks.abs().amax(1) if scales is None else scales[first : first + len(blocks)])
        normal = blocks / scale.where(scale != 0, 1)[:, None]
        codes.copy_(torch.bucketize(normal, middles).view(-1)[: len(part)])


def read_moment(tensors: Mapping[str, Tensor], name: str, moment: str) -> Tensor:
    """A parameter's whole moment in fp32 from a checkpoint of either kind of engine."""
    if f"{name}/{moment}" in tensors:
        return tensors[f"{name}/{moment}"]
    keys = [f"{kind}{_NUMBERS[moment]}" for kind in ("state", "qmap", "absmax")]
    return widen({key: tensors[f"{name}/{key}"] for key in keys if f"{name}/{key}" in tensors}, moment)


def fresh_state(optimizer: Any, parameter: Tensor, step: int) -> dict[str, Any]:
    """The optimizer's empty state of a parameter after so many steps."""
    group = optimizer.param_groups[0]
    held, group["params"] = (
        group["params"],
        [parameter],
    )  # it looks the parameter up there; ZeRO-3 keeps the list empty
    optimizer.state[parameter] = {}
    optimizer.init_state(group, parameter, 0, 0)
    group["params"] = held
    state: dict[str, Any] = optimizer.state[parameter]
    state["step"] = step
    return state
