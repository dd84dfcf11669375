"""The backward of a trained head: logits again, tile by tile, and every gradient that is needed."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_workers import run_on_workers
from .head_scores import HeadCall, passes
from .head_tiles import Cut, Tiles, blocks, cut


class SavedSoftmax(NamedTuple):
    """(N,) statistics of the forward: log-sum-exp = shift + log(total)."""

    shift: Tensor
    total: Tensor
    entropy: Tensor | None


class Inputs(NamedTuple):
    """What the forward was given."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    bias_V: Tensor | None


def head_gradients(
    grad_N: Tensor | None, grad_entropy_N: Tensor | None, inputs: Inputs, softmax: SavedSoftmax, call: HeadCall,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients with respect to hidden, weight and bias, each only if wanted.

    With p = exp(z - shift) / total and G[t, v] = (grad[t] (1[v = y_t] - p[t, v]) + entropy's part) z'[t, v]:
    dhidden = G W, dweight = G^T hidden, dbias = column sums of G. Sums are fp32, each gradient is rounded once.
    """
    hidden, weight, _, bias = inputs
    plan, acc = cut(hidden, weight, call.dtype), softmax.total.dtype
    # A gradient may come expanded (that of a sum does), and kernels walk it by rows.
    grads = (
        torch.zeros_like(softmax.total) if grad_N is None else grad_N.to(acc).contiguous(),
        None if grad_entropy_N is None else grad_entropy_N.to(acc).contiguous(),
    )
    dhs = [hidden.new_zeros(hidden.shape, dtype=acc) if wants[0] else None for _ in plan.vocabulary]
    dw = torch.empty_like(weight) if wants[1] else None
    db = torch.empty_like(bias) if wants[2] and bias is not None else None
    run_on_workers([
        partial(_slice_gradients, inputs, softmax, grads, call, part, plan, dh, dw, db)
        for part, dh in zip(plan.vocabulary, dhs)
    ])  # fmt: skip
    if dhs[0] is None:
        return None, dw, db
    for other in dhs[1:]:
        dhs[0].add_(other)  # type: ignore[arg-type]
    return dhs[0].to(hidden.dtype), dw, db


def _slice_gradients(
    inputs: Inputs, softmax: SavedSoftmax, grads: tuple[Tensor, Tensor | None], call: HeadCall, part: slice, plan: Cut,
    dh: Tensor | None, dw: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    """Fill the rows of dw and db that belong to one slice of the vocabulary; add its share to dh."""
    hidden, weight, target, bias = inputs
    acc, ops = softmax.total.dtype, passes(call.backend)
    most = max((rows.stop - rows.start for rows in plan.rows), default=1)
    tiles = Tiles(most, min(plan.columns, part.stop - part.start), call.dtype, hidden.device)
    for columns in blocks(part.start, part.stop, tiles.columns):
        w = tiles.operand(weight[columns])
        b = None if bias is None else bias[columns]
        dw_tile = None
        if dw is not None:
            dw_tile = dw[columns].zero_() if dw.dtype == acc else w.new_zeros(w.shape, dtype=acc)
        db_tile = w.new_zeros(w.shape[0], dtype=acc)
        for rows in plan.rows:
            h = tiles.operand(hidden[rows])
            g = ops.gradient(tiles, h, w, b, call.transform, columns, target[rows], softmax.shift[rows],
                             softmax.total[rows], grads[0][rows],
                             None if softmax.entropy is None else softmax.entropy[rows],
                             None if grads[1] is None else grads[1][rows])  # fmt: skip
            if dh is not None:
                tiles.accumulate_(dh[rows], g, w)
            if dw_tile is not None:
                tiles.accumulate_(dw_tile, g.t(), h)
            if db is not None:
                db_tile += g.sum(0, dtype=acc)
        if dw is not None and dw_tile is not None and dw.dtype != acc:
            dw[columns] = dw_tile
        if db is not None:
            db[columns] = db_tile
        del w
