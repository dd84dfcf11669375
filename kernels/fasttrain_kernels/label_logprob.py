"""Log-probs of target tokens from logits that already exist: a drop-in for `log_softmax` and `gather`.

    logp[n] = z[n, y_n] - log sum_v exp(z[n, v])            dz = g (onehot - softmax)

One pass over the logits, fp32 inside; no second (N, V) tensor in the forward. The backward makes the gradient in one
pass, over the logits' own memory where the caller allows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import check_tensors, outside_graphs, resolve_backend
from .once_differentiable import once_differentiable

IGNORED = -100

# Bytes of one widened block of rows in the torch backend: it stays in the cache between its passes.
_BLOCK_BYTES = 4 << 20


def label_logprob_ref(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """The definition: log_softmax in the dtype of the logits, gather; ignored rows are exactly 0."""
    ignored = target_N == IGNORED
    logp_NV = torch.where(ignored[:, None], 0, logits_NV).log_softmax(-1)
    return logp_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0].masked_fill(ignored, 0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(logits: Tensor) -> list[slice]:
    n, v = logits.shape
    rows = max(1, _BLOCK_BYTES // (v * _wide(logits.dtype).itemsize))
    return [slice(a, min(a + rows, n)) for a in range(0, n, rows)]


def _forward_torch(logits: Tensor, target: Tensor, maximum: Tensor, total: Tensor, logprob: Tensor) -> None:
    for rows in _blocks(logits):
        z = logits[rows].to(maximum.dtype)
        torch.amax(z, 1, out=maximum[rows])
        picked = z.gather(1, target[rows].clamp(min=0)[:, None])[:, 0] - maximum[rows]
        torch.sum((z - maximum[rows, None]).exp_(), 1, out=total[rows])
        torch.clamp(picked - total[rows].log(), max=0, out=logprob[rows])
    logprob.masked_fill_(target == IGNORED, 0)


def _backward_torch(
    logits: Tensor, target: Tensor, maximum: Tensor, total: Tensor, grad: Tensor, out: Tensor
) -> None:
    ignored = target == IGNORED
    for rows in _blocks(logits):
        p = (logits[rows].to(maximum.dtype) - maximum[rows, None]).exp_()
        p.mul_((grad[rows] / -total[rows])[:, None])
        p.scatter_add_(1, target[rows].clamp(min=0)[:, None], grad[rows, None])
        # Filled, not multiplied by zero: an ignored row may hold NaN.
        out[rows] = p.masked_fill_(ignored[rows, None], 0)


class _LabelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, inplace: bool, backend: str) -> Tensor:
        n = target.shape[0]
        logprob, maximum, total = (logits.new_empty(n, dtype=_wide(logits.dtype)) for _ in range(3))
        if backend == "triton":
            from .label_logprob_triton import forward

            forward(logits, target, maximum, total, logprob)
        else:
            _forward_torch(logits, target, maximum, total, logprob)
        ctx.save_for_backward(logits, target, maximum, total)
        ctx.inplace, ctx.backend = inplace, backend
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Reading saved tensors checks their version: a second backward, or another user of overwritten logits, raises.
        logits, target, maximum, total = ctx.saved_tensors
        grad = grad.to(maximum.dtype).contiguous()
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        if ctx.backend == "triton":
            from .label_logprob_triton import backward

            backward(logits, target, maximum, total, grad, out)
            torch.autograd.graph.increment_version(out)
        else:
            _backward_torch(logits, target, maximum, total, grad, out)
        return out, None, None, None


@outside_graphs("label_logprob runs its own kernels")
def label_logprob(logits_NV: Tensor, target_N: Tensor, *, inplace: bool = False, backend: str | None = None,
                  validate: bool = True) -> Tensor:  # fmt: skip
    """Log-prob of each row's target: (N,) fp32 (fp64 for fp64 logits), differentiable in the logits.

    Args:
        logits_NV: (N, V) fp32, bf16, fp16 or fp64; any row stride, columns next to each other.
        target_N: (N,) int64 in [0, V), or -100: log-prob and gradient of that row are exactly 0, whatever it holds.
        inplace: let the backward write the gradient over the logits, so that no second (N, V) tensor exists. Nothing
            else may need the logits by then: autograd raises if something does. Logits that are a leaf, or a view
            of one, are refused.
        backend: "torch", "triton" or None for `backend_for(logits_NV)`.
        validate: False trusts the ids, which on CUDA saves waiting for the device.

    ValueError names the argument, what was wanted and what came.
    """
    _check(logits_NV, target_N, inplace, validate)
    name = resolve_backend(backend, logits_NV, "label_logprob")
    return _LabelLogprob.apply(logits_NV, target_N.contiguous(), inplace, name)


def _check(logits: Tensor, target: Tensor, inplace: bool, validate: bool) -> None:
    def refuse(name: str, wanted: object, got: object) -> None:
        raise ValueError(f"label_logprob: {name}: wanted {wanted}, got {got}")

    check_tensors("label_logprob", logits_NV=logits, target_N=target)
    if logits.dim() != 2 or logits.shape[1] == 0:
        refuse("logits_NV", "shape (N, V)", tuple(logits.shape))
    if not logits.is_floating_point():
        refuse("logits_NV", "a floating dtype", logits.dtype)
    if logits.stride(1) != 1:
        refuse("logits_NV", "columns next to each other", f"strides {logits.stride()}")
    n, v = logits.shape
    if target.shape != (n,):
        refuse("target_N", f"shape ({n},)", tuple(target.shape))
    if target.dtype != torch.int64:
        refuse("target_N", torch.int64, target.dtype)
    if target.device != logits.device:
        refuse("target_N", f"device {logits.device}", target.device)
    if inplace and n > 1 and logits.stride(0) < v:
        refuse("logits_NV", "rows apart from each other for inplace", f"strides {logits.stride()}")
    base = logits if logits._base is None else logits._base
    if inplace and logits.requires_grad and base.is_leaf and base.requires_grad:
        refuse("inplace", "False for logits that are a leaf or a view of one", True)
    if validate and n:
        low, high = torch.stack(torch.aminmax(torch.where(target == IGNORED, 0, target))).tolist()
        if low < 0 or high >= v:
            refuse("target_N", f"ids in [0, {v}) or {IGNORED}", low if low < 0 else high)
