"""Attention in parts, the one algorithm of every backend that returns a log-sum-exp, over a kernel of two functions.

A row's visible keys are cut into parts that an ordinary attention kernel can do, and merged by their log-sum-exps l:

    l = logaddexp(l_A, l_B)        o = o_A exp(l_A - l) + o_B exp(l_B - l)

A sink s is one more part, with o = 0 and l = s. Backward: every part's kernel is given the merged o and l. Then its
probabilities exp(score - l) and delta = rowsum(dO o) are those of the whole row, so the parts' dQ, dK and dV add up to
the exact ones, and ds = -sum over rows of exp(s - l) delta. No mask is built and no key repeated.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .backends import no_autocast
from .once_differentiable import once_differentiable
from .shared_prefix_merge import merge_, statistics_dtype
from .shared_prefix_plan import All, Part, Plan


class Scores(NamedTuple):
    """From q . k to a score: times `scale`, then softcap * tanh(score / softcap) where there is a softcap."""

    scale: float
    softcap: float | None = None


class Kernel(Protocol):
    """What a backend supplies. q, out: (B, H, M, K); k, v: (B, Hkv, N, K); lse: (B, H, M), fp32 (fp64 for fp64)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: Any, scores: Scores) -> tuple[Tensor, Tensor]:
        """(out, lse) over the pairs that `how` names."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        how: Any,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of those pairs, given the output and the log-sum-exp of the whole rows."""
        ...


class PartsAttention(torch.autograd.Function):
    """A plan run by a kernel: q (1, H, T, K), k and v (1, Hkv, T, K), sinks (H,) or None -> (1, H, T, K)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: Plan,
        kernel: Kernel,
        scores: Scores,
    ) -> Tensor:
        out, lse = _first(q, k, v, plan, kernel, scores)
        for part in plan.more:
            o, l_part = kernel.forward(
                part.queries.take(q), part.keys.take(k), part.keys.take(v), part.how, scores
            )
            merge_(out, lse, part.queries, o, l_part)
        if sinks is not None:
            _merge_sinks_(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *([] if sinks is None else [sinks]))
        ctx.plan, ctx.kernel, ctx.scores = plan, kernel, scores
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *sinks = ctx.saved_tensors
        plan, kernel, scores = ctx.plan, ctx.kernel, ctx.scores
        with no_autocast(grad.device):
            dq, dk, dv = _first_gradients(grad, q, k, v, out, lse, plan, kernel, scores)
            for part in plan.more:
                pieces = _gradients(grad, q, k, v, out, lse, part, kernel, scores)
                for place, sums, piece in zip((part.queries, part.keys, part.keys), (dq, dk, dv), pieces):
                    place.add(sums, piece)
        dsinks = _sinks_gradient(grad, out, lse, sinks[0]) if sinks else None
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None


def _first(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: Kernel, scores: Scores
) -> tuple[Tensor, Tensor]:
    if isinstance(plan.first[0].queries, All):
        (part,) = plan.first
        return kernel.forward(q, part.keys.take(k), part.keys.take(v), part.how, scores)
    heads, tokens, size = q.shape[1:]
    out = q.new_empty(1, tokens, heads, size, dtype=statistics_dtype(q) if plan.more else q.dtype).transpose(
        1, 2
    )
    lse = q.new_empty(1, tokens, heads, dtype=statistics_dtype(q)).transpose(1, 2)
    for part in plan.first:
        o, l_part = kernel.forward(
            part.queries.take(q), part.keys.take(k), part.keys.take(v), part.how, scores
        )
        part.queries.put(out, o)
        part.queries.put(lse, l_part)
    return out, lse


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, kernel: Kernel, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, keys = part.queries.take, part.keys.take
    return kernel.backward(rows(grad), rows(q), keys(k), keys(v), rows(out), rows(lse), part.how, scores)


def _first_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, kernel: Kernel, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if isinstance(plan.first[0].queries, All):
        (part,) = plan.first
        dq, dk, dv = _gradients(grad, q, k, v, out, lse, part, kernel, scores)
        return dq, part.keys.collect(dk, k), part.keys.collect(dv, v)
    # sums of many parts are kept in the statistics' precision and rounded once
    dtype = statistics_dtype(q) if plan.more else q.dtype
    sums = tuple(torch.empty_like(x, dtype=dtype) for x in (q, k, v))
    for part in plan.first:
        pieces = _gradients(grad, q, k, v, out, lse, part, kernel, scores)
        for place, whole, piece in zip((part.queries, part.keys, part.keys), sums, pieces):
            place.put(whole, piece)
    return sums  # type: ignore[return-value]


def _merge_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    sink = sinks.to(lse.dtype)[:, None]
    out.mul_(torch.sigmoid(lse - sink)[..., None])
    lse.copy_(torch.logaddexp(lse, sink.expand_as(lse)))


def _sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
