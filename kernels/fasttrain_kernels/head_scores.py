"""`linear_logprob`, tile by tile: the loops that join the matrix products with a backend's elementwise passes.

The second product accumulates sum exp(z - m) z' W over the vocabulary; when a later tile raises the maximum m, what was
accumulated shrinks with it, as in FlashAttention with K = V = W. Only one tile of logits exists at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import head_passes_torch
from .head_options import LogitTransform
from .head_tiles import Running, Tiles


class HeadCall(NamedTuple):
    """What forward and backward share and is no tensor. `dtype` is what operands are rounded to (autocast)."""

    transform: LogitTransform
    dtype: torch.dtype
    backend: str
    entropy: bool = False
    log_p2: bool = False
    top1: bool = False
    mean_logit: bool = False
    entropy_grad: bool = False


@dataclass
class Scores:
    """What the forward makes of all rows: (N,) each; unit gradients (N, D), in the dtype of the hidden states.

    The log-sum-exp is shift + log(total), kept apart: added up, a large shift would swallow the logarithm.
    """

    logprob: Tensor
    shift: Tensor
    total: Tensor
    entropy: Tensor | None
    log_p2: Tensor | None
    top1: Tensor | None
    mean_logit: Tensor | None
    unit: Tensor | None
    entropy_unit: Tensor | None


def passes(backend: str) -> ModuleType:
    """The elementwise passes of a backend; Triton is imported when it is first used."""
    if backend == "torch":
        return head_passes_torch
    from . import head_passes_triton

    return head_passes_triton


def _empty_scores(hidden: Tensor, tiles: Tiles, call: HeadCall, unit: bool) -> Scores:
    n = hidden.shape[0]

    def new(wanted: bool = True, dtype: torch.dtype = tiles.accumulator) -> Tensor | None:
        return hidden.new_empty(n, dtype=dtype) if wanted else None

    logprob, shift, total = (hidden.new_empty(n, dtype=tiles.accumulator) for _ in range(3))
    entropy_unit = unit and call.entropy_grad
    return Scores(logprob, shift, total, new(call.entropy), new(call.log_p2), new(call.top1, torch.bool), new(call.mean_logit),
                  torch.empty_like(hidden) if unit else None,
                  torch.empty_like(hidden) if entropy_unit else None)  # fmt: skip


def score_rows(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None, call: HeadCall,
               unit: bool) -> Scores:  # fmt: skip
    """Log-probs of the targets, and with `unit` their gradients with respect to the hidden states.

    One product without `unit`, two with it, three if the entropy is to be differentiated too.
    """
    tiles, ops = Tiles(hidden_ND, weight_VD, call.dtype), passes(call.backend)
    out = _empty_scores(hidden_ND, tiles, call, unit)
    for rows in tiles.row_blocks():
        h = tiles.operand(hidden_ND[rows])
        run = Running(
            h.shape[0],
            out.total,
            entropy=call.entropy,
            log_p2=call.log_p2,
            top=call.top1,
            mean=call.mean_logit,
        )
        acc = h.new_empty(h.shape, dtype=tiles.accumulator) if unit else None
        acc_entropy = torch.empty_like(acc) if acc is not None and call.entropy_grad else None
        for columns in tiles.column_blocks():
            w = tiles.operand(weight_VD[columns])
            p, e = ops.fold(tiles, h, w, None if bias_V is None else bias_V[columns], call.transform, run, columns,
                            unit=unit, entropy_unit=acc_entropy is not None)  # fmt: skip
            first = columns.start == 0
            follow = run.follow and not first
            if acc_entropy is not None and acc is not None:
                if follow:
                    # (z - m) shifts with the maximum: a multiple of the other accumulator, before that one shrinks.
                    acc_entropy.addcmul_(acc, run.moved[:, None])
                    ops.shrink_(acc_entropy, run)
                tiles.accumulate_(acc_entropy, e, w, first)
            if acc is not None:
                if follow:
                    ops.shrink_(acc, run)
                tiles.accumulate_(acc, p, w, first)
            del w  # or two widened tiles would exist while the next is made
        _keep(out, rows, run, target_N, weight_VD.shape[0])
        ops.finish(h, weight_VD, bias_V, target_N[rows], call.transform, run, tiles, acc, acc_entropy,
                   out.logprob[rows], _part(out.unit, rows), _part(out.entropy_unit, rows))  # fmt: skip
    return out


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _keep(out: Scores, rows: slice, run: Running, target_N: Tensor, vocabulary: int) -> None:
    out.shift[rows], out.total[rows] = run.m, run.s
    for whole, part in ((out.entropy, run.entropy()), (out.log_p2, run.log_p2())):
        if whole is not None and part is not None:
            whole[rows] = part
    if out.mean_logit is not None and run.z is not None:
        out.mean_logit[rows] = run.z / vocabulary
    if out.top1 is not None and run.top is not None:
        out.top1[rows] = run.top == target_N[rows]


class SavedSoftmax(NamedTuple):
    """(N,) statistics of the forward that the backward of a trained head starts from."""

    shift: Tensor
    total: Tensor
    entropy: Tensor | None


def head_gradients(
    grad_N: Tensor | None, grad_entropy_N: Tensor | None, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor,
    softmax: SavedSoftmax, bias_V: Tensor | None, call: HeadCall, wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients with respect to hidden, weight and bias, each only if wanted; logits are made again, tile by tile.

    With p = exp(z - shift) / total and G[t, v] = (grad[t] (1[v = y_t] - p[t, v]) + entropy's part) z'[t, v]:
    dhidden = G W, dweight = G^T hidden, dbias = column sums of G. Sums are fp32, each gradient is rounded once.
    """
    tiles, ops = Tiles(hidden_ND, weight_VD, call.dtype), passes(call.backend)
    acc = tiles.accumulator
    # A gradient may come expanded (that of a sum does), and kernels walk it by rows.
    grad_N = torch.zeros_like(softmax.total) if grad_N is None else grad_N.to(acc).contiguous()
    grad_entropy_N = None if grad_entropy_N is None else grad_entropy_N.to(acc).contiguous()
    dh = hidden_ND.new_zeros(hidden_ND.shape, dtype=acc) if wants[0] else None
    dw = torch.empty_like(weight_VD) if wants[1] else None
    db = torch.empty_like(bias_V) if wants[2] and bias_V is not None else None
    for columns in tiles.column_blocks():
        w = tiles.operand(weight_VD[columns])
        b = None if bias_V is None else bias_V[columns]
        dw_tile = hidden_ND.new_zeros(w.shape, dtype=acc) if dw is not None else None
        db_tile = hidden_ND.new_zeros(w.shape[0], dtype=acc) if db is not None else None
        for rows in tiles.row_blocks():
            h = tiles.operand(hidden_ND[rows])
            g = ops.gradient(tiles, h, w, b, call.transform, columns, target_N[rows], softmax.shift[rows],
                             softmax.total[rows], grad_N[rows], _part(softmax.entropy, rows),
                             _part(grad_entropy_N, rows))  # fmt: skip
            if dh is not None:
                tiles.accumulate_(dh[rows], g, w)
            if dw_tile is not None:
                tiles.accumulate_(dw_tile, g.t(), h)
            if db_tile is not None:
                db_tile += g.sum(0, dtype=acc)
        del w
        if dw is not None and dw_tile is not None:
            dw[columns] = dw_tile
        if db is not None and db_tile is not None:
            db[columns] = db_tile
    return (None if dh is None else dh.to(hidden_ND.dtype)), dw, db
