"""Kernels for attention in parts that run anywhere torch does: its CPU flash kernels, and plain tiles for the rest."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .shared_prefix_merge import statistics_dtype
from .shared_prefix_parts import Scores
from .shared_prefix_plan import Visible

# Rows below which a piece is not worth a batch of its own.
SHORTEST_PIECE = 32


class CpuFlash:
    """PyTorch's CPU flash kernels, which return and accept the log-sum-exp. They have no softcap."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: Visible, scores: Scores) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        mask = additive_mask(q, k, how)
        out: tuple[Tensor, Tensor] = flash(q, k, v, 0.0, how.causal, attn_mask=mask, scale=scores.scale)
        return out

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        how: Visible,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pieces = _row_pieces(q, k, how)
        if pieces > 1:
            return _in_row_pieces(pieces, grad, q, k, v, out, lse, scores)
        return _flash_backward(grad, q, k, v, out, lse, how, scores)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, how: Visible, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    mask = additive_mask(q, k, how)
    grads: tuple[Tensor, Tensor, Tensor] = flash(
        grad, q, k, v, out, lse, 0.0, how.causal, attn_mask=mask, scale=scores.scale
    )
    return grads


def _row_pieces(q: Tensor, k: Tensor, how: Visible) -> int:
    """In how many pieces the rows of a rectangle give every thread as much to do: the kernel shares out key heads only."""
    threads, heads = torch.get_num_threads(), k.shape[0] * k.shape[1]
    pieces = threads // math.gcd(threads, heads)
    plain = not how.causal and how.above is None and q.shape[0] == 1
    return pieces if plain and q.shape[2] >= pieces * SHORTEST_PIECE else 1


def _in_row_pieces(
    pieces: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward of a rectangle with its rows cut into equal pieces, as a batch over the same keys."""
    rows, everything = q.shape[2], Visible()
    even = rows - rows % pieces

    def cut(x: Tensor) -> Tensor:
        return x[0, :, :even].unflatten(1, (pieces, -1)).transpose(0, 1)

    keys, values = (x.expand(pieces, -1, -1, -1) for x in (k, v))
    dq, dk, dv = _flash_backward(cut(grad), cut(q), keys, values, cut(out), cut(lse), everything, scores)
    dq, dk, dv = dq.transpose(0, 1).flatten(1, 2)[None], dk.sum(0, True), dv.sum(0, True)
    if even == rows:
        return dq, dk, dv
    last_grad, last_q, last_out, last_lse = (x[:, :, even:] for x in (grad, q, out, lse))
    last = _flash_backward(last_grad, last_q, k, v, last_out, last_lse, everything, scores)
    return torch.cat([dq, last[0]], 2), dk + last[1], dv + last[2]


def additive_mask(q: Tensor, k: Tensor, how: Visible) -> Tensor | None:
    """(M, N) of 0 and -inf in q's dtype for a part with a moving edge, else None."""
    return None if how.above is None else _edge(q.shape[-2], k.shape[-2], how.above, q.dtype, str(q.device))


@functools.lru_cache(maxsize=64)
def _edge(rows: int, keys: int, above: int, dtype: torch.dtype, device: str) -> Tensor:
    hidden = torch.ones(rows, keys, dtype=torch.bool, device=device).tril_(above - 1)
    return torch.zeros(rows, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


class Tiles:
    """Scores of a few rows at a time as whole matrices, in the statistics' precision, on any device: does softcaps.

    Grouped queries share their keys by broadcasting; a tile holds H x 128 x keys scores.
    """

    rows = 128

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: Visible, scores: Scores) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        key, value = _keys(k), _keys(v)
        for first in range(0, q.shape[2], self.rows):
            query = _queries(q, first, self.rows, k)
            score, _ = _score(query, key, first, how, scores)
            lse = score.logsumexp(-1)
            outs.append((score.sub_(lse[..., None]).exp_() @ value).flatten(1, 2).to(q.dtype))
            lses.append(lse.flatten(1, 2))
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        how: Visible,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        key, value = _keys(k), _keys(v)
        dqs, dk, dv = [], torch.zeros_like(key[:, :, 0]), torch.zeros_like(value[:, :, 0])
        for first in range(0, q.shape[2], self.rows):
            query, gradient, whole = (_queries(x, first, self.rows, k) for x in (q, grad, out))
            score, slope = _score(query, key, first, how, scores)
            probability = score.sub_(_queries(lse[..., None], first, self.rows, k)).exp_()
            dv += (probability.transpose(-1, -2) @ gradient).sum(2)
            delta = (gradient * whole).sum(-1, keepdim=True)
            dscore = (gradient @ value.transpose(-1, -2)).sub_(delta).mul_(probability).mul_(scores.scale)
            if slope is not None:
                dscore.mul_(slope)
            dqs.append((dscore @ key).flatten(1, 2).to(q.dtype))
            dk += (dscore.transpose(-1, -2) @ query).sum(2)
        return torch.cat(dqs, 2), dk.to(k.dtype), dv.to(v.dtype)


def _queries(x: Tensor, first: int, rows: int, k: Tensor) -> Tensor:
    """Rows of (B, H, M, K) as (B, Hkv, H / Hkv, rows, K), in the statistics' precision."""
    return x[:, :, first : first + rows].to(statistics_dtype(x)).unflatten(1, (k.shape[1], -1))


def _keys(x: Tensor) -> Tensor:
    """(B, Hkv, N, K) as (B, Hkv, 1, N, K), in the statistics' precision."""
    return x.to(statistics_dtype(x))[:, :, None]


def _score(
    query: Tensor, key: Tensor, first: int, how: Visible, scores: Scores
) -> tuple[Tensor, Tensor | None]:
    """Scores of the part's rows from `first`, and the softcap's slope there."""
    score = (query @ key.transpose(-1, -2)).mul_(scores.scale)
    slope = None
    if scores.softcap is not None:
        bent = score.div_(scores.softcap).tanh_()
        slope = 1 - bent * bent
        score = bent.mul_(scores.softcap)
    if how.causal or how.above is not None:
        visible = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device)
        visible = visible.tril_(first) if how.causal else visible.triu_(how.above + first)  # type: ignore[operator]
        score.masked_fill_(~visible, float("-inf"))
    return score, slope
