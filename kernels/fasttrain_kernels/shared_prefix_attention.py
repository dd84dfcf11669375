"""Attention over [prompt | completion | completion ...]: every query sees its prompt and its own past, at exact cost."""

from __future__ import annotations

from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import autocast_dtype, autocast_on, check_tensors, no_autocast, outside_graphs
from .shared_prefix import SharedPrefixLayout
from .shared_prefix_backends import (
    AttentionCase,
    attention_case,
    choose_attention,
    flash_kernel,
    why_not_attention,
)
from .shared_prefix_cpu import CpuFlash, Tiles
from .shared_prefix_parts import Kernel, PartsAttention, Scores
from .shared_prefix_plan import attention_plan
from .shared_prefix_varlen import flash_plan


def shared_prefix_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scale: float | None = None, *,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition: dense scores, everything a row may not see at -inf, softmax over keys and sink; (1, H, T, K)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~layout.dense_mask(q.device, window), float("-inf"))
    if sinks is None:
        return scores.softmax(-1) @ v
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


@outside_graphs("shared_prefix_attention makes its own plan; lengths differ from pack to pack")
def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scale: float | None = None,
    backend: str | None = None, *, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of every row to its prompt and its own past: q (1, H, T, K), k and v (1, Hkv, T, K) -> (1, H, T, K).

    Hkv divides H (grouped queries, keys are not repeated); scale defaults to K ** -0.5. With `window` a query at position
    p sees positions p - window + 1 to p; positions of completions go on from the prompt's end. `softcap` bends scores to
    softcap * tanh(score / softcap). `sinks` (H,) are scores that take part in a head's softmax without a value. The layout
    may make spans of a prompt bidirectional. The result lies in memory as (1, T, H, K), so that transposing it for the
    output projection costs nothing.

    Under autocast q, k and v are rounded to its dtype, as `F.scaled_dot_product_attention` does; fp64 stays fp64.

    Backends: "flash" (flash-attn 2, 3 or 4), "flex" (FlexAttention), "sdpa" (the CPU flash kernels part by part; dense
    masked attention elsewhere); None picks the first that can run. ValueError names the argument, what was wanted and what
    came, also where the backend asked for cannot run.
    """
    check_tensors("shared_prefix_attention", q=q, k=k, v=v, **({} if sinks is None else {"sinks": sinks}))
    if autocast_on(q.device):
        q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
        with no_autocast(q.device):
            return shared_prefix_attention(
                q, k, v, layout, scale, backend, window=window, softcap=softcap, sinks=sinks
            )
    _check(q, k, v, layout)
    _check_options(q, scale, window, softcap, sinks)
    # The kernels step through a row one number at a time; rows may lie anywhere.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    window = layout.binding_window(None if window is None else int(window))
    softcap = None if softcap is None else float(softcap)
    scores = Scores(q.shape[-1] ** -0.5 if scale is None else float(scale), softcap)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    case = attention_case(q, layout, wants_grad, softcap is not None)
    if backend is None:
        backend = choose_attention(case)[0]
    else:
        reason = why_not_attention(backend, case)
        if reason:
            _refuse("backend", "one that can run", f"{backend!r}: {reason}")
    if backend == "flash":
        return _flash(q, k, v, layout, scores, window, sinks, case)
    if backend == "flex":
        from .shared_prefix_flex import flex

        return flex(q, k, v, layout, scores, window, sinks)
    return _sdpa(q, k, v, layout, scores, window, sinks)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scores: Scores, window: int | None,
    sinks: Tensor | None, case: AttentionCase,
) -> Tensor:  # fmt: skip
    kernel = flash_kernel(case)
    assert not isinstance(kernel, str)
    out: Tensor = PartsAttention.apply(q, k, v, sinks, flash_plan(layout, window, q.device), kernel, scores)
    return out


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scores: Scores, window: int | None, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    if q.device.type != "cpu" and scores.softcap is None and sinks is None:
        mask = layout.dense_mask(q.device, window)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale, enable_gqa=gqa)
    plan = layout.cached(("parts", window), lambda: attention_plan(layout, window))
    kernel: Kernel = Tiles() if scores.softcap is not None or q.device.type != "cpu" else CpuFlash()
    out: Tensor = PartsAttention.apply(q, k, v, sinks, plan, kernel, scores)
    return out


def _refuse(name: str, wanted: object, got: object) -> None:
    raise ValueError(f"shared_prefix_attention: {name}: wanted {wanted}, got {got}")


def _check(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout) -> None:
    if not isinstance(layout, SharedPrefixLayout):
        _refuse("layout", "a SharedPrefixLayout", type(layout).__name__)
    t = layout.tokens
    if not q.is_floating_point():
        _refuse("q", "a floating dtype", q.dtype)
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != t:
        _refuse("q", f"shape (1, H, {t}, K)", tuple(q.shape))
    if k.dim() != 4 or k.shape[0] != 1 or k.shape[2:] != q.shape[2:] or q.shape[1] % k.shape[1]:
        _refuse("k", f"shape (1, a divisor of {q.shape[1]}, {t}, {q.shape[3]})", tuple(k.shape))
    if v.shape != k.shape:
        _refuse("v", f"shape {tuple(k.shape)} as k", tuple(v.shape))
    for name, other in (("k", k), ("v", v)):
        if other.dtype != q.dtype:
            _refuse(name, f"dtype {q.dtype} as q", other.dtype)
        if other.device != q.device:
            _refuse(name, f"device {q.device} as q", other.device)


def _check_options(
    q: Tensor, scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    if window is not None and not (isinstance(window, Integral) and window >= 1):
        _refuse("window", "1 token or more", window)
    for name, number in (("scale", scale), ("softcap", softcap)):
        # kernels hide scores with -inf before they scale them: any other number would make NaN of those; a tensor would get
        # no gradient
        if number is not None and not (isinstance(number, Real) and 0 < number < float("inf")):
            _refuse(name, "a positive number", repr(number))
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device):
        _refuse("sinks", f"shape ({q.shape[1]},) on {q.device}", f"{tuple(sinks.shape)} on {sinks.device}")
