"""The whole preference family in one Triton launch: losses, their gradients, rewards and the mean.

One program walks the pairs (a batch has tens to thousands, 8 numbers each), so the mean is summed in order. Formulas and
sources are in `preference_kinds`; here each comes with its derivative. Kinds that sort over the batch are not here.
"""

# ruff: noqa: SIM109 -- Triton has no `in` over compile-time values
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import device_of
from .preference_kinds import F_DIVERGENCES, KINDS, Terms, rewards_per_token

_BLOCK = 256

_SIGMOID = tl.constexpr(KINDS.index("sigmoid"))
_ROBUST = tl.constexpr(KINDS.index("robust"))
_HINGE = tl.constexpr(KINDS.index("hinge"))
_IPO = tl.constexpr(KINDS.index("ipo"))
_SIGMOID_NORM = tl.constexpr(KINDS.index("sigmoid_norm"))
_EXO_PAIR = tl.constexpr(KINDS.index("exo_pair"))
_NCA_PAIR = tl.constexpr(KINDS.index("nca_pair"))
_BCO_PAIR = tl.constexpr(KINDS.index("bco_pair"))
_SPPO_HARD = tl.constexpr(KINDS.index("sppo_hard"))
_APO_ZERO = tl.constexpr(KINDS.index("apo_zero"))
_APO_DOWN = tl.constexpr(KINDS.index("apo_down"))
_DISCOPOP = tl.constexpr(KINDS.index("discopop"))
_CPO = tl.constexpr(KINDS.index("cpo"))
_SIMPO = tl.constexpr(KINDS.index("simpo"))
_ORPO = tl.constexpr(KINDS.index("orpo"))
_SFT = tl.constexpr(KINDS.index("sft"))

_FORWARD_KL = tl.constexpr(F_DIVERGENCES.index("forward_kl"))
_JS = tl.constexpr(F_DIVERGENCES.index("js_divergence"))
_ALPHA = tl.constexpr(F_DIVERGENCES.index("alpha_divergence"))
_MAX_EXPONENT = tl.constexpr(80.0)


@triton.jit
def _at_most(x, top):
    # tl.minimum would make `top` of NaN.
    return tl.where(x > top, top, x)


@triton.jit
def _S(x):
    return tl.where(x >= 0, 1.0, tl.exp(-tl.abs(x))) / (1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _log_S(x):
    # log1p(e) = log(1 + e) e / ((1 + e) - 1): what rounding took from 1 + e is given back.
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def _expm1(x):
    # Taylor near 0, where e^x - 1 cancels.
    series = x * (
        1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    )
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1)


@triton.jit
def _score(x, F: tl.constexpr, f_a, MOST: tl.constexpr):
    """The f-divergence score of a log-ratio, and its derivative."""
    value, slope = x, x * 0 + 1.0
    if F == _FORWARD_KL:
        slope = tl.where(-x < MOST, tl.exp(_at_most(-x, MOST)), 0.0)
        value = -_expm1(_at_most(-x, MOST))
    elif F == _JS:
        value, slope = 0.6931471805599453 + _log_S(x), _S(-x)
    elif F == _ALPHA:
        y = f_a * x
        slope = tl.where(y < MOST, tl.exp(_at_most(y, MOST)), 0.0)
        value = _expm1(_at_most(y, MOST)) / f_a
    return value, slope


@triton.jit
def _smoothed(x, s):
    """-(1-s) log S(x) - s log S(-x), and its derivative."""
    return -(1 - s) * _log_S(x) - s * _log_S(-x), s * _S(x) - (1 - s) * _S(-x)


@triton.jit
def _log_odds(x):
    """log(e^x / (1 - e^x)) and its derivative; x is kept off 0 in 1 - e^x."""
    rest = -_expm1(_at_most(x, -1e-7))
    return x - tl.log(rest), tl.where(x < -1e-7, 1.0 / rest, 1.0)


@triton.jit
def _of_margin(KIND: tl.constexpr, x, s, log_1ms, log_s, tau):
    """Kinds that see only x = beta * d: loss and dloss/dx."""
    if KIND == _SIGMOID:
        loss, dx = _smoothed(x, s)
    elif KIND == _ROBUST:
        loss = (s * _log_S(-x) - (1 - s) * _log_S(x)) / (1 - 2 * s)
        dx = -(s * _S(x) + (1 - s) * _S(-x)) / (1 - 2 * s)
    elif KIND == _HINGE:
        loss = tl.where(x >= 1, 0.0, 1 - x)
        dx = tl.where(x < 1, -1.0, 0.0)
    elif KIND == _EXO_PAIR:
        loss = _S(x) * (_log_S(x) - log_1ms) + _S(-x) * (_log_S(-x) - log_s)
        dx = _S(x) * _S(-x) * (x - log_1ms + log_s)
    else:  # discopop
        share = _S(x / tau)
        e = tl.exp(_at_most(-x, _MAX_EXPONENT))
        loss = share * e - (1 - share) * _log_S(x)
        dx = share * (1 - share) / tau * (_log_S(x) + e) - (1 - share) * _S(-x)
        dx -= tl.where(-x < _MAX_EXPONENT, share * e, 0.0)
    return loss, dx


@triton.jit
def _of_ratios(KIND: tl.constexpr, c, r, beta):
    """Kinds that see the two log-ratios apart: loss, dloss/dc, dloss/dr."""
    if KIND == _NCA_PAIR:
        loss = -_log_S(beta * c) - 0.5 * _log_S(-beta * c) - 0.5 * _log_S(-beta * r)
        dc = beta * (0.5 * _S(beta * c) - _S(-beta * c))
        dr = 0.5 * beta * _S(beta * r)
    elif KIND == _BCO_PAIR:
        loss = -_log_S(beta * c) - _log_S(-beta * r)
        dc, dr = -beta * _S(-beta * c), beta * _S(beta * r)
    elif KIND == _SPPO_HARD:
        e, f = c - 0.5 / beta, r + 0.5 / beta
        loss, dc, dr = e * e + f * f, 2 * e, 2 * f
    elif KIND == _APO_ZERO:
        loss = _S(-beta * c) + _S(beta * r)
        dc = -beta * _S(beta * c) * _S(-beta * c)
        dr = beta * _S(beta * r) * _S(-beta * r)
    else:  # apo_down
        d = beta * (c - r)
        loss = _S(beta * c) + _S(-d)
        dr = beta * _S(d) * _S(-d)
        dc = beta * _S(beta * c) * _S(-beta * c) - dr
    return loss, dc, dr


@triton.jit
def _one_kind(
    KIND: tl.constexpr, F: tl.constexpr, a, b, c, r, lc, lr, beta, s, log_1ms, log_s, tau, gamma, f_a
):
    """Loss and its derivatives with respect to the chosen and the rejected log-prob."""
    if KIND == _CPO:
        loss, dx = _smoothed(beta * (a - b), s)
        da, db = beta * dx, -beta * dx
    elif KIND == _SIMPO:
        loss, dx = _smoothed(beta * (a / lc - b / lr) - gamma, s)
        da, db = beta * dx / lc, -beta * dx / lr
    elif KIND == _ORPO:
        odds_a, slope_a = _log_odds(a / lc)
        odds_b, slope_b = _log_odds(b / lr)
        x = odds_a - odds_b
        loss, dx = -beta * _log_S(x), -beta * _S(-x)
        da, db = dx * slope_a / lc, -dx * slope_b / lr
    elif (KIND == _IPO) or (KIND == _SIGMOID_NORM):
        # ipo squares the scores, so their exponents are cut at half
        MOST: tl.constexpr = _MAX_EXPONENT / 2 if KIND == _IPO else _MAX_EXPONENT
        score_c, slope_c = _score(c, F, f_a, MOST)
        score_r, slope_r = _score(r, F, f_a, MOST)
        x = score_c / lc - score_r / lr
        if KIND == _IPO:
            e = x - 0.5 / beta
            loss, dx = e * e, 2 * e
        else:
            loss, dx = -_log_S(beta * x), -beta * _S(-beta * x)
        da, db = dx * slope_c / lc, -dx * slope_r / lr
    elif (
        (KIND == _NCA_PAIR)
        or (KIND == _BCO_PAIR)
        or (KIND == _SPPO_HARD)
        or (KIND == _APO_ZERO)
        or (KIND == _APO_DOWN)
    ):
        loss, da, db = _of_ratios(KIND, c, r, beta)
    else:
        score_c, slope_c = _score(c, F, f_a, _MAX_EXPONENT)
        score_r, slope_r = _score(r, F, f_a, _MAX_EXPONENT)
        loss, dx = _of_margin(KIND, beta * (score_c - score_r), s, log_1ms, log_s, tau)
        da, db = beta * dx * slope_c, -beta * dx * slope_r
    return loss, da, db


@triton.jit(do_not_specialize=["pairs"])
def preference_kernel(
    a_ptr, b_ptr, x_ptr, y_ptr, lc_ptr, lr_ptr, weight_ptr, sft_ptr, mean_length_ptr,
    loss_ptr, mean_ptr, da_ptr, db_ptr, dsft_ptr, reward_a_ptr, reward_b_ptr,
    pairs, beta, s, log_1ms, log_s, tau, gamma, f_a,
    KINDS: tl.constexpr, WEIGHTS: tl.constexpr, F: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_WEIGHT: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), dtype)
    for start in range(0, pairs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < pairs
        a = tl.load(a_ptr + i, mask=inside, other=-1.0)
        b = tl.load(b_ptr + i, mask=inside, other=-1.0)
        c, r, lc, lr = a, b, a * 0 + 1.0, a * 0 + 1.0
        if HAS_REFERENCE:
            c = a - tl.load(x_ptr + i, mask=inside, other=-1.0)
            r = b - tl.load(y_ptr + i, mask=inside, other=-1.0)
        if HAS_LENGTHS:
            lc = tl.load(lc_ptr + i, mask=inside, other=1.0)
            lr = tl.load(lr_ptr + i, mask=inside, other=1.0)
        weight = a * 0 + 1.0
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
        loss = tl.zeros((BLOCK,), dtype)
        da = tl.zeros((BLOCK,), dtype)
        db = tl.zeros((BLOCK,), dtype)
        dsft = tl.zeros((BLOCK,), dtype)
        for k in tl.static_range(len(KINDS)):
            if KINDS[k] == _SFT:
                length = tl.load(mean_length_ptr)
                loss -= WEIGHTS[k] * tl.load(sft_ptr + i, mask=inside, other=0.0) / length
                dsft -= WEIGHTS[k] / length
            else:
                one, one_a, one_b = _one_kind(
                    KINDS[k], F, a, b, c, r, lc, lr, beta, s, log_1ms, log_s, tau, gamma, f_a
                )
                loss += WEIGHTS[k] * one
                da += WEIGHTS[k] * one_a
                db += WEIGHTS[k] * one_b
        loss = tl.where(inside, loss * weight, 0.0)
        total += loss
        tl.store(loss_ptr + i, loss, mask=inside)
        tl.store(da_ptr + i, da * weight, mask=inside)
        tl.store(db_ptr + i, db * weight, mask=inside)
        tl.store(dsft_ptr + i, dsft * weight, mask=inside)
        if PER_TOKEN:
            c, r = c / lc, r / lr
        tl.store(reward_a_ptr + i, beta * c, mask=inside)
        tl.store(reward_b_ptr + i, beta * r, mask=inside)
    tl.store(mean_ptr, tl.sum(total, axis=0) / pairs)


class Launched(NamedTuple):
    """What one launch leaves: mean (), and (P,) losses, gradients and rewards."""

    mean: Tensor
    losses: Tensor
    chosen_grad: Tensor
    rejected_grad: Tensor
    sft_grad: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def launch(t: Terms, kinds: tuple[str, ...], factors: tuple[float, ...], weight: Tensor | None) -> Launched:
    """Run the kernel on checked inputs; `t` holds contiguous tensors of one dtype."""
    a, pairs = t.chosen.contiguous(), t.chosen.shape[0]
    out = Launched(a.new_empty(()), *(torch.empty_like(a) for _ in range(6)))
    if not pairs:
        out.mean.zero_()
        return out
    # Triton takes Python's numbers alone
    beta, s, tau, gamma, f_a = map(
        float, (t.beta, t.label_smoothing, t.discopop_tau, t.simpo_gamma, t.f_alpha - 1)
    )
    other = [t.rejected, t.ref_chosen, t.ref_rejected, t.chosen_length, t.rejected_length, weight, t.sft_logprob,
             t.mean_chosen_length]  # fmt: skip
    divergence = t.f_divergence
    if divergence == "alpha_divergence" and abs(t.f_alpha - 1) < 1e-6:
        divergence = "reverse_kl"
    arguments = (
        a, *(a if x is None else x.contiguous() for x in other), out.losses, out.mean, out.chosen_grad,
        out.rejected_grad, out.sft_grad, out.chosen_reward, out.rejected_reward, pairs, beta, s, _log(1 - s),
        _log(s), tau, gamma, f_a,
    )  # fmt: skip
    with device_of(a):
        preference_kernel[(1,)](
            *arguments, KINDS=tuple(KINDS.index(k) for k in kinds), WEIGHTS=factors, F=F_DIVERGENCES.index(divergence),
            HAS_REFERENCE=t.ref_chosen is not None,
            HAS_LENGTHS=t.chosen_length is not None and t.rejected_length is not None, HAS_WEIGHT=weight is not None,
            PER_TOKEN=rewards_per_token(kinds, t.ref_chosen is not None), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _log(x: float) -> float:
    return math.log(x) if x > 0 else 0.0
