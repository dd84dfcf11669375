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
from torch.autograd.function import once_differentiable

from .shared_prefix_plan import Plan


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
            merge_(part.queries.take(out), part.queries.take(lse), o, l_part)
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
        # sums of many parts are kept in the statistics' precision and rounded once
        dtype = statistics_dtype(q) if plan.more else q.dtype
        dq, dk, dv = (torch.empty_like(x, dtype=dtype) for x in (q, k, v))
        for number, part in enumerate([*plan.first, *plan.more]):
            rows = (part.queries.take(x) for x in (grad, q))
            keys = (part.keys.take(x) for x in (k, v))
            whole = (part.queries.take(x) for x in (out, lse))
            gq, gk, gv = kernel.backward(*rows, *keys, *whole, part.how, scores)  # type: ignore[call-arg]
            for place, sums, piece in ((part.queries, dq, gq), (part.keys, dk, gk), (part.keys, dv, gv)):
                if number < len(plan.first):
                    place.put(sums, piece)
                else:
                    place.add(sums, piece)
        dsinks = _sinks_gradient(grad, out, lse, sinks[0]) if sinks else None
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Of log-sum-exps and sums: fp32, or fp64 where the inputs are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _first(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: Kernel, scores: Scores
) -> tuple[Tensor, Tensor]:
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


def merge_(out: Tensor, lse: Tensor, o: Tensor, l_part: Tensor) -> None:
    """Merge a part (o, l_part) into (out, lse) in place, in the statistics' precision."""
    share = torch.sigmoid(l_part - lse)[..., None]
    if out.dtype == share.dtype == o.dtype:
        out.lerp_(o, share)
    else:
        out.copy_(torch.lerp(out.to(share.dtype), o.to(share.dtype), share))
    torch.logaddexp(lse, l_part, out=lse)


def _merge_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    sink = sinks.to(lse.dtype)[:, None]
    out.mul_(torch.sigmoid(lse - sink)[..., None])
    lse.copy_(torch.logaddexp(lse, sink.expand_as(lse)))


def _sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
