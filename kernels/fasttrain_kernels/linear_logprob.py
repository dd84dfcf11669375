"""Log-probs of target tokens from hidden states and the head's weight; logits never exist as a whole.

    logp[t] = z[t, y_t] - log sum_v exp(z[t, v])          z = transform(h W^T + bias), see `LogitTransform`

The gradient of any loss with respect to h_t is dL/dlogp_t times the unit gradient

    u_t = z'[t, y_t] W[y_t] - sum_v softmax(z_t)_v z'[t, v] W[v]

which does not depend on the loss. With a frozen head the forward makes logp and u together (two matrix products) and
the backward scales rows: it needs neither W nor logits. A trained head recomputes logits in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import resolve_backend
from .head_options import LogitTransform
from .linear_logprob_torch import Scores, head_gradients, score_rows

IGNORED = -100


class LinearLogprob(NamedTuple):
    """Per row: logprob (N,), and by request entropy (N,) in nats and log_p2 (N,) = log sum_v p_v^2; fp32."""

    logprob: Tensor
    entropy: Tensor | None = None
    log_p2: Tensor | None = None


def linear_logprob_ref(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, entropy: bool = False, log_p2: bool = False,
) -> LinearLogprob:  # fmt: skip
    """The definition: whole logits in the dtype of the inputs, log_softmax, gather; ignored rows are exactly 0."""
    tr = LogitTransform(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    ignored = target_N == IGNORED
    hidden_ND = torch.where(ignored[:, None], 0, hidden_ND)
    logp_NV = tr.reference(hidden_ND @ weight_VD.t(), bias).log_softmax(-1)
    logp = logp_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0].masked_fill(ignored, 0)
    h = -(logp_NV.exp() * logp_NV).sum(-1).masked_fill(ignored, 0) if entropy else None
    p2 = (2 * logp_NV).logsumexp(-1).masked_fill(ignored, 0) if log_p2 else None
    return LinearLogprob(logp, h, p2)


class _Call(NamedTuple):
    """What does not change between forward and backward and is no tensor."""

    transform: LogitTransform
    dtype: torch.dtype
    entropy: bool
    log_p2: bool


def _without_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _optional(scores: Scores, call: _Call) -> tuple[Tensor, ...]:
    empty = scores.logprob.new_empty(0)
    return (
        scores.entropy if scores.entropy is not None else empty,
        scores.log_p2 if scores.log_p2 is not None else empty,
    )


class _FrozenHead(torch.autograd.Function):
    """Forward: log-probs and unit gradients. Backward: one row scaling."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: _Call,
                ) -> tuple[Tensor, ...]:  # fmt: skip
        with _without_autocast(hidden.device):
            scores = score_rows(hidden, weight, target, bias, call.transform, call.dtype, unit=True,
                                entropy=call.entropy, log_p2=call.log_p2)  # fmt: skip
        ctx.save_for_backward(scores.unit)
        optional = _optional(scores, call)
        ctx.mark_non_differentiable(*optional)
        return scores.logprob, *optional

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        out = torch.empty_like(unit)
        torch.mul(unit, grad[:, None], out=out)
        return out, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Forward: log-probs only. Backward: logits again, and every gradient that is needed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: _Call,
                ) -> tuple[Tensor, ...]:  # fmt: skip
        with _without_autocast(hidden.device):
            scores = score_rows(hidden, weight, target, bias, call.transform, call.dtype, unit=False,
                                entropy=call.entropy, log_p2=call.log_p2)  # fmt: skip
        ctx.save_for_backward(hidden, weight, target, bias, scores.maximum, scores.total)
        ctx.call = call
        optional = _optional(scores, call)
        ctx.mark_non_differentiable(*optional)
        return scores.logprob, *optional

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, bias, *softmax = ctx.saved_tensors
        call: _Call = ctx.call
        wants = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        with _without_autocast(hidden.device):
            dh, dw, db = head_gradients(
                grad, hidden, weight, target, tuple(softmax), bias, call.transform, call.dtype, wants=wants
            )
        return dh, dw, None, db, None


def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, entropy: bool = False, backend: str | None = None, *,
    log_p2: bool = False,
) -> LinearLogprob:  # fmt: skip
    """Log-prob of each row's target token, differentiable in hidden_ND, weight_VD and bias.

    Args:
        hidden_ND: (N, D) fp32, bf16, fp16 or fp64; final hidden states of the rows that predict.
        weight_VD: (V, D), the head; same dtype, unless autocast is on.
        target_N: (N,) int64 in [0, V), or -100: log-prob and gradient of that row are exactly 0, whatever it holds.
        bias: (V,) added to the products; then `logit_scale`, tanh `softcap`, division by `temperature`, in this order.
        entropy: also return each row's entropy in nats (no gradient).
        log_p2: also return each row's log sum_v p_v^2 (no gradient), which WPO weights are made of.
        backend: "torch", "triton" or None for `backend_for(hidden_ND)`.

    Returns LinearLogprob: fp32 (fp64 for fp64 inputs) whatever the inputs are; logits are never rounded to 16 bits.
    Which head it is, trained or frozen, is read from `requires_grad`; under no_grad only the first product runs.
    ValueError names the argument, what was wanted and what came.
    """
    tr = LogitTransform(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    _check(hidden_ND, weight_VD, target_N, bias)
    resolve_backend(backend, hidden_ND, "linear_logprob")
    call = _Call(tr, _product_dtype(hidden_ND, weight_VD), entropy, log_p2)
    ignored = target_N == IGNORED
    if target_N.numel() and bool(ignored.any()):
        return _on_kept_rows(hidden_ND, weight_VD, target_N, bias, call, (~ignored).nonzero()[:, 0])
    return _all_rows(hidden_ND, weight_VD, target_N, bias, call)


def _all_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: _Call
) -> LinearLogprob:
    grad = torch.is_grad_enabled()
    if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        logp, entropy, p2 = _TrainedHead.apply(hidden, weight, target, bias, call)
    elif grad and hidden.requires_grad:
        logp, entropy, p2 = _FrozenHead.apply(hidden, weight, target, bias, call)
    else:
        with _without_autocast(hidden.device):
            scores = score_rows(hidden, weight, target, bias, call.transform, call.dtype, unit=False,
                                entropy=call.entropy, log_p2=call.log_p2)  # fmt: skip
        return LinearLogprob(scores.logprob, scores.entropy, scores.log_p2)
    return LinearLogprob(logp, entropy if call.entropy else None, p2 if call.log_p2 else None)


def _on_kept_rows(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: _Call, keep: Tensor,
                  ) -> LinearLogprob:  # fmt: skip
    # Ignored rows take no part in any product; index_select's gradient leaves exact zeros in them.
    part = _all_rows(hidden.index_select(0, keep), weight, target[keep], bias, call)

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(target.shape).index_copy(0, keep, x)

    logp = spread(part.logprob)
    assert logp is not None
    return LinearLogprob(logp, spread(part.entropy), spread(part.log_p2))


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_logprob: weight_VD: wanted dtype {hidden.dtype} as hidden_ND, got {weight.dtype}"
        )
    return hidden.dtype


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    def refuse(name: str, wanted: object, got: object) -> None:
        raise ValueError(f"linear_logprob: {name}: wanted {wanted}, got {got}")

    if hidden.dim() != 2:
        refuse("hidden_ND", "shape (N, D)", tuple(hidden.shape))
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        refuse("hidden_ND", "a floating dtype", hidden.dtype)
    n, d = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != d or weight.shape[0] == 0:
        refuse("weight_VD", f"shape (V, {d})", tuple(weight.shape))
    if target.shape != (n,):
        refuse("target_N", f"shape ({n},)", tuple(target.shape))
    if target.dtype != torch.int64:
        refuse("target_N", torch.int64, target.dtype)
    if bias is not None and bias.shape != (weight.shape[0],):
        refuse("bias", f"shape ({weight.shape[0]},)", tuple(bias.shape))
    for name, other in (("weight_VD", weight), ("target_N", target), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            refuse(name, f"device {hidden.device}", other.device)
    if n:
        low, high = (int(x) for x in torch.aminmax(torch.where(target == IGNORED, 0, target)))
        if low < 0 or high >= weight.shape[0]:
            refuse("target_N", f"ids in [0, {weight.shape[0]}) or {IGNORED}", low if low < 0 else high)
