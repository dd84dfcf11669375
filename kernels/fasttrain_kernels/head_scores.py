"""`linear_logprob`, tile by tile: the loops that join the matrix products with a backend's elementwise passes.

The second product accumulates sum exp(z - m) z' W over the vocabulary; when a later tile raises the maximum m, what was
accumulated shrinks with it, as in FlashAttention with K = V = W. A thread holds one tile of logits at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import head_passes_torch
from .backends import device_of
from .cpu_workers import run_on_workers
from .head_options import LogitTransform
from .head_running import Running
from .head_tiles import Cut, Tiles, accumulator_dtype, blocks, cut


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
    """What the forward makes of all rows: (N,) each; unit gradients (N, D) in `unit_dtype`.

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


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of unit gradients for hidden states of a dtype: the same, but fp32 for fp16, where they would underflow: they are
    made before the loss scale reaches them."""
    return torch.float32 if dtype == torch.float16 else dtype


def _empty_scores(hidden: Tensor, call: HeadCall, unit: bool) -> Scores:
    n, dtype = hidden.shape[0], accumulator_dtype(call.dtype)

    def new(wanted: bool, dtype: torch.dtype = dtype) -> Tensor | None:
        return hidden.new_empty(n, dtype=dtype) if wanted else None

    def new_unit(wanted: bool) -> Tensor | None:
        return torch.empty_like(hidden, dtype=unit_dtype(hidden.dtype)) if wanted else None

    logprob, shift, total = (hidden.new_empty(n, dtype=dtype) for _ in range(3))
    return Scores(logprob, shift, total, new(call.entropy), new(call.log_p2), new(call.top1, torch.bool),
                  new(call.mean_logit), new_unit(unit), new_unit(unit and call.entropy_grad))  # fmt: skip


def score_rows(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None, call: HeadCall,
               unit: bool) -> Scores:  # fmt: skip
    """Log-probs of the targets, and with `unit` their gradients with respect to the hidden states.

    One product without `unit`, two with it, three if the entropy is to be differentiated too.
    """
    with device_of(hidden_ND):
        return _score_rows(hidden_ND, weight_VD, target_N, bias_V, call, unit)


def _score_rows(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None, call: HeadCall,
                unit: bool) -> Scores:  # fmt: skip
    plan, out = cut(hidden_ND, weight_VD, call.dtype), _empty_scores(hidden_ND, call, unit)
    for wave in blocks(0, len(plan.rows), plan.together):
        here = plan.rows[wave]
        # Buffers are made here, on the calling thread: allocators and memory profilers know threads apart.
        scans: list[_Scan] = []
        for rows in here:
            h = hidden_ND[rows]
            for part in plan.vocabulary:
                scans.append(_Scan(h, weight_VD, bias_V, part, plan, call, unit))
                h = scans[-1].h  # as the products take it, made once
        runs = run_on_workers([scan.run for scan in scans])
        each = len(plan.vocabulary)
        for i, rows in enumerate(here):
            run = runs[i * each]
            for other in runs[i * each + 1 : (i + 1) * each]:
                run.absorb_(other)
            _keep(out, rows, run, target_N, weight_VD.shape[0])
            passes(call.backend).finish(
                scans[i * each].h, weight_VD, bias_V, target_N[rows], call.transform, run, call.dtype,
                out.logprob[rows], _part(out.unit, rows), _part(out.entropy_unit, rows),
            )  # fmt: skip
    return out


class _Scan:
    """One block of rows over one slice of the vocabulary."""

    def __init__(self, hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, part: slice, plan: Cut, call: HeadCall,
                 unit: bool) -> None:  # fmt: skip
        self.weight, self.bias, self.part, self.call, self.unit = weight_VD, bias_V, part, call, unit
        columns = min(plan.columns, part.stop - part.start)
        self.tiles = Tiles(hidden.shape[0], columns, call.dtype, hidden.device)
        self.h = self.tiles.operand(hidden)
        self.state = Running(hidden.shape[0], self.tiles.accumulator, hidden.device, entropy=call.entropy,
                             log_p2=call.log_p2, top=call.top1, mean=call.mean_logit)  # fmt: skip
        if unit:
            self.state.acc = self.h.new_empty(self.h.shape, dtype=self.tiles.accumulator)
        if unit and call.entropy_grad:
            self.state.acc_entropy = self.h.new_empty(self.h.shape, dtype=self.tiles.accumulator)

    def run(self) -> Running:
        tiles, run, ops, call = self.tiles, self.state, passes(self.call.backend), self.call
        for columns in blocks(self.part.start, self.part.stop, tiles.columns):
            w = tiles.operand(self.weight[columns])
            p, e = ops.fold(tiles, self.h, w, _part(self.bias, columns), call.transform, run, columns,
                            unit=self.unit, entropy_unit=run.acc_entropy is not None)  # fmt: skip
            first = columns.start == self.part.start
            if run.follow and not first and self.unit:
                ops.move_products_(run)
            if run.acc_entropy is not None:
                tiles.accumulate_(run.acc_entropy, e, w, first)
            if run.acc is not None:
                tiles.accumulate_(run.acc, p, w, first)
            del w  # or two widened tiles would exist while the next is made
        return run


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
