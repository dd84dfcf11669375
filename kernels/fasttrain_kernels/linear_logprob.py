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

from .backends import autocast_dtype, autocast_on, check_tensors, no_autocast, outside_graphs, resolve_backend
from .head_gradients import Inputs, SavedSoftmax, head_gradients
from .head_options import LogitTransform
from .head_scores import HeadCall, Scores, score_rows
from .once_differentiable import once_differentiable

IGNORED = -100

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LinearLogprob(NamedTuple):
    """Per row (N,), fp32: logprob, and by request entropy in nats, log_p2 = log sum_v p_v^2, bool top1, mean_logit."""

    logprob: Tensor
    entropy: Tensor | None = None
    log_p2: Tensor | None = None
    top1: Tensor | None = None
    mean_logit: Tensor | None = None


def linear_logprob_ref(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> LinearLogprob:  # fmt: skip
    """The definition: whole logits in the dtype of the inputs, log_softmax, gather; ignored rows are exactly 0."""
    tr = LogitTransform(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    ignored = target_N == IGNORED
    hidden_ND = torch.where(ignored[:, None], 0, hidden_ND)
    z_NV = tr.reference(hidden_ND @ weight_VD.t(), bias)
    logp_NV = z_NV.log_softmax(-1)
    logp = logp_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0]
    entropy, log_p2 = -(logp_NV.exp() * logp_NV).sum(-1), (2 * logp_NV).logsumexp(-1)
    top1 = (logp_NV.argmax(-1) == target_N) & ~ignored
    logp, entropy, log_p2 = (x.masked_fill(ignored, 0) for x in (logp, entropy, log_p2))
    return LinearLogprob(logp, entropy, log_p2, top1, z_NV.mean(-1).masked_fill(ignored, 0))


def _outputs(ctx: Any, scores: Scores) -> tuple[Tensor | None, ...]:
    fixed = [x for x in (scores.log_p2, scores.top1, scores.mean_logit) if x is not None]
    if scores.entropy is not None and not ctx.call.entropy_grad:
        fixed.append(scores.entropy)
    ctx.mark_non_differentiable(*fixed)
    ctx.set_materialize_grads(False)
    return scores.logprob, scores.entropy, scores.log_p2, scores.top1, scores.mean_logit


class _FrozenHead(torch.autograd.Function):
    """Forward: log-probs and unit gradients. Backward: one row scaling."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: HeadCall,
                ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.call, ctx.dtype = call, hidden.dtype
        with no_autocast(hidden.device):
            scores = score_rows(hidden, weight, target, bias, call, unit=True)
        ctx.save_for_backward(scores.unit, scores.entropy_unit)
        return _outputs(ctx, scores)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        unit, entropy_unit = ctx.saved_tensors
        out = torch.empty_like(unit, dtype=ctx.dtype)
        if grad is None:
            out.zero_()
        else:
            torch.mul(unit, grad[:, None], out=out)
        if entropy_unit is not None and grad_entropy is not None:
            out.add_(entropy_unit * grad_entropy[:, None])
        return out, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Forward: log-probs only. Backward: logits again, and every gradient that is needed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: HeadCall,
                ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.call = call
        with no_autocast(hidden.device):
            scores = score_rows(hidden, weight, target, bias, call, unit=False)
        ctx.save_for_backward(hidden, weight, target, bias, scores.shift, scores.total, scores.entropy)
        return _outputs(ctx, scores)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, target, bias, *softmax = ctx.saved_tensors
        wants = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        with no_autocast(hidden.device):
            dh, dw, db = head_gradients(grad, grad_entropy, Inputs(hidden, weight, target, bias), SavedSoftmax(*softmax),
                                        ctx.call, wants)  # fmt: skip
        return dh, dw, None, db, None


class _UnitGradient(torch.autograd.Function):
    """Log-probs that exist already, with the gradient that was made with them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logprob: Tensor, unit: Tensor) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.dtype = hidden.dtype
        return logprob.view_as(logprob)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        out = torch.empty_like(unit, dtype=ctx.dtype)
        torch.mul(unit, grad[:, None], out=out)
        return out, None, None


def with_unit_gradient(hidden_ND: Tensor, logprob_N: Tensor, unit_ND: Tensor) -> Tensor:
    """`logprob_N`, differentiable in hidden_ND by the unit gradient that `linear_logprob_and_unit` returned with it.

    For heads whose weight is only there inside a module's forward, as under ZeRO-3: the module returns numbers without
    history, so that nothing asks for the weight again in the backward.
    """
    for name, x, shape in (
        ("logprob_N", logprob_N, hidden_ND.shape[:1]),
        ("unit_ND", unit_ND, hidden_ND.shape),
    ):
        if x.shape != shape:
            raise ValueError(f"with_unit_gradient: {name}: wanted shape {tuple(shape)}, got {tuple(x.shape)}")
    return _UnitGradient.apply(hidden_ND, logprob_N, unit_ND)  # type: ignore[no-any-return]


@outside_graphs("linear_logprob cuts its own tiles; N differs from batch to batch")
@torch.no_grad()
def linear_logprob_and_unit(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, entropy: bool = False, backend: str | None = None, *,
    log_p2: bool = False, top1: bool = False, mean_logit: bool = False, validate: bool = True,
) -> tuple[LinearLogprob, Tensor]:  # fmt: skip
    """`linear_logprob` without history, and the unit gradients d logprob / d hidden (N, D) in the dtype of hidden_ND.

    For fp16 they are fp32: they would underflow before a loss scale reaches them. Arguments as there, without ignored
    rows. Join them again with `with_unit_gradient`.
    """
    tr = LogitTransform(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    _check(hidden_ND, weight_VD, target_N, bias)
    if validate and _has_ignored(target_N, weight_VD.shape[0]):
        _refuse("target_N", f"ids in [0, {weight_VD.shape[0]})", IGNORED)
    name = _backend(backend, hidden_ND)
    call = HeadCall(tr, _product_dtype(hidden_ND, weight_VD), name, entropy=entropy, log_p2=log_p2, top1=top1,
                    mean_logit=mean_logit, entropy_grad=False)  # fmt: skip
    if name == "triton":
        hidden_ND, weight_VD, bias = (_rows_in_memory(x) for x in (hidden_ND, weight_VD, bias))
    with no_autocast(hidden_ND.device):
        scores = score_rows(hidden_ND, weight_VD, target_N.contiguous(), bias, call, unit=True)
    assert scores.unit is not None
    out = LinearLogprob(scores.logprob, scores.entropy, scores.log_p2, scores.top1, scores.mean_logit)
    return out, scores.unit


@outside_graphs("linear_logprob cuts its own tiles; N differs from batch to batch")
def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, entropy: bool = False, backend: str | None = None, *,
    entropy_grad: bool = False, log_p2: bool = False, top1: bool = False, mean_logit: bool = False,
    validate: bool = True,
) -> LinearLogprob:  # fmt: skip
    """Log-prob of each row's target token, differentiable in hidden_ND, weight_VD and bias.

    Args:
        hidden_ND: (N, D) fp32, bf16, fp16 or fp64; final hidden states of the rows that predict.
        weight_VD: (V, D), the head; same dtype, unless autocast is on.
        target_N: (N,) int64 in [0, V), or -100: log-prob and gradient of that row are exactly 0, whatever it holds.
        bias: (V,) added to the products; then `logit_scale`, tanh `softcap`, division by `temperature`, in this order.
        entropy: also return each row's entropy in nats; `entropy_grad` makes it differentiable (one product more).
        log_p2: also return each row's log sum_v p_v^2 (no gradient), which WPO weights are made of.
        top1: also return whether the target has the (first) largest logit.
        mean_logit: also return the mean of each row's logits (no gradient).
        backend: "torch", "triton" or None for `backend_for(hidden_ND)`.
        validate: False trusts target_N to be in [0, V) everywhere. On CUDA that saves waiting for the device, which
            checking ids and leaving out ignored rows need.

    Returns LinearLogprob: fp32 (fp64 for fp64 inputs) whatever the inputs are; logits are never rounded to 16 bits.
    Which head it is, trained or frozen, is read from `requires_grad`; under no_grad only the first product runs.
    ValueError names the argument, what was wanted and what came.
    """
    tr = LogitTransform(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    _check(hidden_ND, weight_VD, target_N, bias)
    name = _backend(backend, hidden_ND)
    call = HeadCall(
        tr,
        _product_dtype(hidden_ND, weight_VD),
        name,
        entropy=entropy or entropy_grad,
        log_p2=log_p2,
        top1=top1,
        mean_logit=mean_logit,
        entropy_grad=entropy_grad,
    )
    if name == "triton":
        hidden_ND, weight_VD, bias = (_rows_in_memory(x) for x in (hidden_ND, weight_VD, bias))
    target_N = target_N.contiguous()
    if validate and _has_ignored(target_N, weight_VD.shape[0]):
        keep = (target_N != IGNORED).nonzero()[:, 0]
        return _on_kept_rows(hidden_ND, weight_VD, target_N, bias, call, keep)
    return _all_rows(hidden_ND, weight_VD, target_N, bias, call)


def _all_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: HeadCall
) -> LinearLogprob:
    grad = torch.is_grad_enabled()
    if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return LinearLogprob(*_TrainedHead.apply(hidden, weight, target, bias, call))
    if grad and hidden.requires_grad:
        return LinearLogprob(*_FrozenHead.apply(hidden, weight, target, bias, call))
    with no_autocast(hidden.device):
        scores = score_rows(hidden, weight, target, bias, call, unit=False)
    return LinearLogprob(scores.logprob, scores.entropy, scores.log_p2, scores.top1, scores.mean_logit)


def _on_kept_rows(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: HeadCall, keep: Tensor,
                  ) -> LinearLogprob:  # fmt: skip
    # Ignored rows take no part in any product; index_select's gradient leaves exact zeros in them.
    part = _all_rows(hidden.index_select(0, keep), weight, target[keep], bias, call)

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(target.shape).index_copy(0, keep, x)

    return LinearLogprob(spread(part.logprob), *(None if x is None else spread(x) for x in part[1:]))


def _rows_in_memory(x: Any) -> Any:
    # Kernels step through a row one element at a time; rows may lie anywhere.
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _backend(name: str | None, hidden: Tensor) -> str:
    """The backend that runs: the Triton kernels compute in fp32, so fp64 is torch's."""
    if hidden.dtype != torch.float64:
        return resolve_backend(name, hidden, "linear_logprob")
    if name == "triton":
        _refuse("hidden_ND", "fp32, bf16 or fp16 for backend 'triton'", "fp64")
    return resolve_backend(name or "torch", hidden, "linear_logprob")


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if autocast_on(hidden.device) and hidden.dtype != torch.float64:
        return autocast_dtype(hidden)
    if hidden.dtype != weight.dtype:
        _refuse("weight_VD", f"dtype {hidden.dtype} as hidden_ND", weight.dtype)
    return hidden.dtype


def _has_ignored(target: Tensor, vocabulary: int) -> bool:
    """Whether a row is ignored; ValueError where an id is out of range. One transfer from the device."""
    if not target.numel():
        return False
    ignored = target == IGNORED
    low, high = torch.aminmax(torch.where(ignored, 0, target))
    lowest, highest, any_ignored = torch.stack([low, high, ignored.any().to(low.dtype)]).tolist()
    if lowest < 0 or highest >= vocabulary:
        _refuse("target_N", f"ids in [0, {vocabulary}) or {IGNORED}", lowest if lowest < 0 else highest)
    return bool(any_ignored)


def _refuse(name: str, wanted: object, got: object) -> None:
    raise ValueError(f"linear_logprob: {name}: wanted {wanted}, got {got}")


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    given = {} if bias is None else {"bias": bias}
    check_tensors("linear_logprob", hidden_ND=hidden, weight_VD=weight, target_N=target, **given)
    for name, x in (("hidden_ND", hidden), ("weight_VD", weight), ("target_N", target), ("bias", bias)):
        if hasattr(x, "full_tensor"):  # a DTensor
            _refuse(name, "a whole tensor, as a weight is inside the forward of its FSDP module", "a DTensor")
    if hidden.dim() != 2:
        _refuse("hidden_ND", "shape (N, D)", tuple(hidden.shape))
    # autocast would round the integers of a quantised weight too
    for name, x in (("hidden_ND", hidden), ("weight_VD", weight), ("bias", bias)):
        if x is not None and x.dtype not in _DTYPES:
            _refuse(name, "a floating dtype", x.dtype)
    n, d = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != d or weight.shape[0] == 0:
        _refuse("weight_VD", f"shape (V, {d})", tuple(weight.shape))
    if target.shape != (n,):
        _refuse("target_N", f"shape ({n},)", tuple(target.shape))
    if target.dtype != torch.int64:
        _refuse("target_N", torch.int64, target.dtype)
    if bias is not None and bias.shape != (weight.shape[0],):
        _refuse("bias", f"shape ({weight.shape[0]},)", tuple(bias.shape))
    for name, other in (("weight_VD", weight), ("target_N", target), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            _refuse(name, f"device {hidden.device}", other.device)
