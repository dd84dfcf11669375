"""Attention over [prompt | completion | completion ...]: every query sees its prompt and its own past, at exact cost.

A row's visible keys are cut into parts that ordinary attention kernels can do (its own segment, causal; keys before that
segment, not causal) and merged by their log-sum-exps l:

    l = logaddexp(l_A, l_B)        o = o_A exp(l_A - l) + o_B exp(l_B - l)

Backward: every part's kernel is given the merged o and l. Then its probabilities exp(s - l) and delta = rowsum(dO o) are
those of the whole row, so the parts' dQ, dK and dV add up to the exact ones. No mask is built and no key copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .shared_prefix import SharedPrefixLayout

BACKENDS = ("sdpa",)

# The CPU kernels do whole rectangles where causality would need half. Segments are therefore cut into blocks of about
# this many rows: less waste on the diagonal, still enough rows to keep the matrix products busy.
_BLOCK = 128


class Diagonal(NamedTuple):
    """`segments` neighbouring segments of `length` rows from `start`, each causal over itself."""

    start: int
    segments: int
    length: int


class Rectangle(NamedTuple):
    """Query rows [q0, q1) over all the keys [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int


class Plan(NamedTuple):
    """All visible (query, key) pairs of a layout, each once; the diagonals cover every row once."""

    diagonals: list[Diagonal]
    rectangles: list[Rectangle]


def attention_plan(layout: SharedPrefixLayout, block: int = _BLOCK) -> Plan:
    """Cut a layout into diagonals and rectangles."""
    segments: list[tuple[int, int]] = []
    rectangles: list[Rectangle] = []
    row = 0
    for prompt, lengths in layout.groups:
        start, end = row, row + prompt + sum(lengths)
        # One completion continues its prompt: together they are an ordinary causal sequence.
        bounds = [prompt + lengths[0]] if len(lengths) == 1 else [prompt, *lengths]
        if len(lengths) > 1:
            rectangles.append(Rectangle(row + prompt, end, start, row + prompt))
        for length in bounds:
            cut = _cut(row, length, block)
            segments += cut
            rectangles += [Rectangle(a, a + n, row, a) for a, n in cut[1:]]
            row += length
    return Plan(_runs(segments), rectangles)


def _cut(start: int, length: int, block: int) -> list[tuple[int, int]]:
    pieces = max(1, round(length / block))
    size = -(-length // pieces)
    return [(a, min(size, start + length - a)) for a in range(start, start + length, size)]


def _runs(segments: list[tuple[int, int]]) -> list[Diagonal]:
    # Neighbours of equal length become one batch, without a copy: a strided view.
    out: list[Diagonal] = []
    for start, length in segments:
        if out and out[-1].length == length and out[-1].start + out[-1].segments * length == start:
            out[-1] = out[-1]._replace(segments=out[-1].segments + 1)
        else:
            out.append(Diagonal(start, 1, length))
    return out


def _batch(x: Tensor, d: Diagonal) -> Tensor:
    """View of (1, heads, T, ...) as (segments, heads, length, ...)."""
    rows = x[0, :, d.start : d.start + d.segments * d.length]
    return rows.unflatten(1, (d.segments, d.length)).transpose(0, 1)


class _CpuParts(torch.autograd.Function):
    """The parts of a plan on PyTorch's CPU flash kernels, which return and accept the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        heads, tokens, size = q.shape[1:]
        out = q.new_empty(1, tokens, heads, size).transpose(1, 2)
        lse = q.new_empty(1, tokens, heads, dtype=_statistics(q)).transpose(1, 2)
        for d in plan.diagonals:
            o, part = flash(_batch(q, d), _batch(k, d), _batch(v, d), 0.0, True, scale=scale)
            _batch(out, d).copy_(o)
            _batch(lse, d).copy_(part)
        for r in plan.rectangles:
            o, part = flash(q[:, :, r.q0 : r.q1], k[:, :, r.k0 : r.k1], v[:, :, r.k0 : r.k1], scale=scale)
            _merge_(out[:, :, r.q0 : r.q1], lse[:, :, r.q0 : r.q1], o, part)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for d in ctx.plan.diagonals:
            parts = flash(*(_batch(x, d) for x in (grad, q, k, v, out, lse)), 0.0, True, scale=ctx.scale)
            for whole, part in zip((dq, dk, dv), parts):
                _batch(whole, d).copy_(part)
        for r in ctx.plan.rectangles:
            rows, keys = slice(r.q0, r.q1), slice(r.k0, r.k1)
            gq, gk, gv = flash(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
                               lse[:, :, rows], 0.0, False, scale=ctx.scale)  # fmt: skip
            dq[:, :, rows] += gq
            dk[:, :, keys] += gk
            dv[:, :, keys] += gv
        return dq, dk, dv, None, None


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _merge_(out: Tensor, lse: Tensor, o: Tensor, part: Tensor) -> None:
    share = torch.sigmoid(part - lse)[..., None]
    if out.dtype == share.dtype:
        out.lerp_(o, share)
    else:
        out.copy_(torch.lerp(out.to(share.dtype), o.to(share.dtype), share))
    torch.logaddexp(lse, part, out=lse)


def shared_prefix_attention_ref(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scale: float | None = None,
                                ) -> Tensor:  # fmt: skip
    """The definition: dense scores, everything a row may not see at -inf, softmax; (1, H, T, K)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    return scores.masked_fill(~layout.dense_mask(q.device), float("-inf")).softmax(-1) @ v


def attention_backend_for(tensor: Tensor) -> str:
    """Name of the backend that `backend=None` picks for queries like this one."""
    return "sdpa"


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scale: float | None = None,
                            backend: str | None = None) -> Tensor:  # fmt: skip
    """Attention of every row to its prompt and its own past: q (1, H, T, K), k and v (1, Hkv, T, K) -> (1, H, T, K).

    Hkv divides H (grouped queries, keys are not repeated); scale defaults to K ** -0.5. The result lies in memory as
    (1, T, H, K), so that transposing it for the output projection costs nothing. Backend "sdpa" runs the two-part
    algorithm on CPU and dense masked attention elsewhere. ValueError names the argument, what was wanted and what came.
    """
    _check(q, k, v, layout)
    name = backend or attention_backend_for(q)
    if name not in BACKENDS:
        raise ValueError(
            f"shared_prefix_attention: backend: wanted one of {', '.join(BACKENDS)}, got {name!r}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.device.type == "cpu":
        plan = layout.cached("cpu plan", lambda: attention_plan(layout))
        return _CpuParts.apply(q, k, v, plan, scale)
    mask = layout.dense_mask(q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _check(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout) -> None:
    def refuse(name: str, wanted: object, got: object) -> None:
        raise ValueError(f"shared_prefix_attention: {name}: wanted {wanted}, got {got}")

    t = layout.tokens
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != t:
        refuse("q", f"shape (1, H, {t}, K)", tuple(q.shape))
    if k.dim() != 4 or k.shape[0] != 1 or k.shape[2:] != q.shape[2:] or q.shape[1] % k.shape[1]:
        refuse("k", f"shape (1, a divisor of {q.shape[1]}, {t}, {q.shape[3]})", tuple(k.shape))
    if v.shape != k.shape:
        refuse("v", f"shape {tuple(k.shape)} as k", tuple(v.shape))
    for name, other in (("k", k), ("v", v)):
        if other.dtype != q.dtype:
            refuse(name, f"dtype {q.dtype} as q", other.dtype)
        if other.device != q.device:
            refuse(name, f"device {q.device} as q", other.device)
