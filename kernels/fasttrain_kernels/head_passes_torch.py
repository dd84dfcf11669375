"""The elementwise passes of `linear_logprob` over one tile of logits, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .head_options import LogitTransform
from .head_running import Running
from .head_tiles import Tiles

# What a row of exp(z - m) may add up to before m has to move: far from overflow in fp32, squares included.
_HEADROOM = 1e13


def _logits(tiles: Tiles, h: Tensor, w: Tensor, bias: Tensor | None, tr: LogitTransform,
            ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    z = tiles.product(h, w, tr.product_scale, bias)
    return z, tr.finish_(z)


def _exp_around_last_shift_(z: Tensor, run: Running) -> Tensor | None:
    """exp(z - m) in place with the m of the tiles before, and its row sums; None where m must move.

    Later maxima seldom lie far above the first tile's. Trying saves the pass that finds them and the rescaling of what
    was accumulated; on CUDA looking at the outcome would wait for the device.
    """
    run.follow = False
    total = z.sub_(run.m[:, None]).exp_().sum(1)
    # False for NaN too.
    return total if bool((total < _HEADROOM).all()) else None


def _exp_around_maximum_(z: Tensor, run: Running, first: int) -> Tensor:
    """exp(z - m) in place with m = max(m, max z), and its row sums; earlier sums follow m."""
    if run.top is None:
        peak = z.amax(1)
    else:
        peak, index = z.max(1)
        run.top = torch.where(peak > run.m, index + first, run.top)
    run.move_(torch.maximum(run.m, peak))
    run.follow = True
    return z.sub_(run.m[:, None]).exp_().sum(1)


def fold(tiles: Tiles, h: Tensor, w: Tensor, bias: Tensor | None, tr: LogitTransform, run: Running, columns: slice,
         *, unit: bool, entropy_unit: bool) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Make a tile of logits and take it into the running softmax.

    With `unit`, returns the coefficients exp(z - m) z' of the second product; with `entropy_unit` also those of the
    entropy's gradient, (z - m) exp(z - m) z'. Both (rows, columns), valid until the next call.
    """
    p, slope = _logits(tiles, h, w, bias, tr)
    if run.z is not None:
        run.z.add_(p.sum(1))
    total = None
    if run.started and run.top is None and p.device.type == "cpu":
        total = _exp_around_last_shift_(p, run)
        if total is None:
            p, slope = _logits(tiles, h, w, bias, tr)
    if total is None:
        total = _exp_around_maximum_(p, run, columns.start)
    # entr(p) = -p log p is 0 where p underflows, where (z - m) p could be -inf * 0.
    plogp = torch.special.entr(p) if run.a is not None else None
    if run.a is not None and plogp is not None:
        run.a.sub_(plogp.sum(1))
    if run.q is not None:
        run.q.add_(torch.linalg.vector_norm(p, dim=1).square_())
    run.s.add_(total)
    run.started = True
    if not unit:
        return None, None
    if slope is not None:
        p.mul_(slope)
    if not entropy_unit or plogp is None:
        return p, None
    return p, (plogp.neg_() if slope is None else plogp.neg_().mul_(slope))


def move_products_(run: Running) -> None:
    """Make the accumulated products follow a maximum that moved."""
    run.move_products_()


def finish(h: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target: Tensor, tr: LogitTransform, run: Running,
           dtype: torch.dtype, logprob: Tensor, unit: Tensor | None, entropy_unit: Tensor | None) -> None:  # fmt: skip
    """Fill logprob (rows,) and, where given, unit and entropy_unit (rows, D) of one block of rows."""
    w_target = weight_VD[target].to(dtype).to(run.s.dtype)
    z = torch.linalg.vecdot(h.to(run.s.dtype), w_target)
    if bias_V is not None:
        z = z + bias_V[target].to(z.dtype)
    z = z * tr.product_scale
    slope = tr.finish_(z)
    # A log-prob is never positive; rounding of two close numbers may say otherwise.
    torch.clamp(z - run.m - run.s.log(), max=0, out=logprob)
    acc, acc_entropy, entropy = run.acc, run.acc_entropy, run.entropy()
    if unit is None or acc is None:
        return
    acc.div_(run.s[:, None])
    if entropy_unit is not None and acc_entropy is not None and entropy is not None:
        log_s = run.s.log()
        acc_entropy.div_(run.s[:, None]).addcmul_(acc, (entropy - log_s)[:, None])
        entropy_unit.copy_(acc_entropy.mul_(-tr.slope_scale))
    if slope is not None:
        w_target.mul_(slope[:, None])
    unit.copy_(w_target.sub_(acc).mul_(tr.slope_scale))


def gradient(tiles: Tiles, h: Tensor, w: Tensor, bias: Tensor | None, tr: LogitTransform, columns: slice,
             target: Tensor, m: Tensor, s: Tensor, grad: Tensor, entropy: Tensor | None, grad_entropy: Tensor | None,
             ) -> Tensor:  # fmt: skip
    """Make a tile of logits again and turn it into the gradient with respect to h w^T, in place: (rows, columns)."""
    z = tiles.product(h, w, tr.product_scale, bias)
    slope = tr.finish_(z)
    p = z.sub_(m[:, None]).exp_().div_(s[:, None])
    if grad_entropy is None or entropy is None:
        p.mul_(-grad[:, None])
    else:
        # -p (g + g_H (log p + H)), with p log p from entr, which is 0 where p is.
        plogp = torch.special.entr(p).mul_(grad_entropy[:, None])
        p.mul_(-torch.addcmul(grad, grad_entropy, entropy)[:, None]).add_(plogp)
    inside = (target >= columns.start) & (target < columns.stop)
    index = (target - columns.start).clamp(0, p.shape[1] - 1)
    p.scatter_add_(1, index[:, None], (grad * inside)[:, None])
    if slope is not None:
        p.mul_(slope)
    return p if tr.slope_scale == 1.0 else p.mul_(tr.slope_scale)
