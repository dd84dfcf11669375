"""Per-token values to sequences and pairs: sums, length-desensitised sums (LD-DPO), WPO weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import check_tensors
from .linear_logprob import linear_logprob


def sequence_sums(value_N: Tensor, lengths_S: Tensor, validate: bool = True) -> Tensor:
    """(S,) fp32 (fp64) sums of consecutive stretches of value_N (N,); lengths_S int64 (S,) add up to N.

    Summed in fp64 and in order, so a sequence's sum does not depend on its neighbours. ValueError names the argument, what was
    wanted and what came. `validate=False` skips checking that the lengths add up, for which the host must wait for the device: wrong
    lengths then read outside value_N.
    """
    _check("sequence_sums", value_N, lengths_S)
    return _wide_sums(value_N, lengths_S.to(value_N.device, non_blocking=True), validate).to(_result(value_N))


def pair_sums(
    value_N: Tensor, lengths_S: Tensor, pairs_P2: Tensor, ld_alpha: float | None = None, validate: bool = True
) -> tuple[Tensor, Tensor]:
    """Sums over the chosen and the rejected answer of every pair: (P,), (P,).

    Args:
        value_N: (N,) log-prob per token, completion by completion; policy's or reference's.
        lengths_S: int64 (S,) tokens per completion.
        pairs_P2: int64 (P, 2) indices of the chosen and the rejected completion.
        ld_alpha: LD-DPO (Liu et al., arXiv 2409.06411): in each pair the first min(Lc, Lr) tokens of both answers count
            fully, the rest times ld_alpha. None, or 1.0: the plain sum.
        validate: as in `sequence_sums`; False trusts the indices too.
    """
    check_ld_alpha(ld_alpha)
    _check("pair_sums", value_N, lengths_S, pairs_P2)
    if validate:
        check_pairs("pair_sums", pairs_P2, len(lengths_S))
    lengths_S = lengths_S.to(value_N.device, non_blocking=True)
    sums_P2 = _wide_sums(value_N, lengths_S, validate)[pairs_P2]
    if ld_alpha is not None:
        shared_P = lengths_S[pairs_P2].amin(1)
        head_P2 = _heads(value_N, lengths_S, pairs_P2, shared_P)
        sums_P2 = head_P2 + ld_alpha * (sums_P2 - head_P2)
    chosen_P, rejected_P = sums_P2.to(_result(value_N)).unbind(1)
    return chosen_P, rejected_P


@torch.no_grad()
def wpo_weights(
    logp_N: Tensor, log_p2_N: Tensor, lengths_S: Tensor, pairs_P2: Tensor, validate: bool = True
) -> Tensor:
    """(P,) weight of each pair, no gradient: WPO, Zhou et al., arXiv 2406.11827, eq. 2.

    w = exp(mean over tokens of (logp - log sum_v p_v^2)) per answer; a pair's weight is the product of its two. `validate` as in
    `pair_sums`.
    """
    check_tensors("wpo_weights", log_p2_N=log_p2_N)
    _check("wpo_weights", logp_N, lengths_S, pairs_P2)
    if validate:
        check_pairs("wpo_weights", pairs_P2, len(lengths_S))
    if log_p2_N.shape != logp_N.shape:
        _refuse("wpo_weights", "log_p2_N", f"shape {tuple(logp_N.shape)} as logp_N", tuple(log_p2_N.shape))
    lengths_S = lengths_S.to(logp_N.device, non_blocking=True)
    mean_S = sequence_sums(logp_N.double() - log_p2_N.double(), lengths_S, validate) / lengths_S.clamp(min=1)
    return mean_S[pairs_P2].sum(1).exp().to(_result(logp_N))


def check_ld_alpha(ld_alpha: float | None) -> None:
    """ValueError where it is not a number in [0, 1] or None."""
    if ld_alpha is not None and not 0 <= ld_alpha <= 1:
        _refuse("pair_sums", "ld_alpha", "a number in [0, 1] or None", ld_alpha)


def check_pairs(operation: str, pairs_P2: Tensor, sequences: int) -> None:
    """ValueError where an index is no completion's: a negative one would silently count from the last. Waits for the device."""
    if pairs_P2.numel():
        low, high = torch.stack(torch.aminmax(pairs_P2)).tolist()
        if low < 0 or high >= sequences:
            _refuse(operation, "pairs_P2", f"indices in [0, {sequences})", low if low < 0 else high)


def _check(operation: str, value_N: Tensor, lengths_S: Tensor, pairs_P2: Tensor | None = None) -> None:
    """What shapes and dtypes tell; the numbers in them are on the device."""
    name = "logp_N" if operation == "wpo_weights" else "value_N"
    check_tensors(operation, **{name: value_N}, lengths_S=lengths_S)
    if pairs_P2 is not None:
        check_tensors(operation, pairs_P2=pairs_P2)
    if value_N.dim() != 1:
        _refuse(operation, name, "shape (N,)", tuple(value_N.shape))
    if lengths_S.dim() != 1 or lengths_S.dtype not in (torch.int64, torch.int32):
        _refuse(operation, "lengths_S", "int64 of shape (S,)", f"{lengths_S.dtype} {tuple(lengths_S.shape)}")
    if pairs_P2 is not None and (
        pairs_P2.shape[1:] != (2,) or pairs_P2.dtype not in (torch.int64, torch.int32)
    ):
        _refuse(operation, "pairs_P2", "int64 of shape (P, 2)", f"{pairs_P2.dtype} {tuple(pairs_P2.shape)}")


def _refuse(operation: str, name: str, wanted: object, got: object) -> None:
    raise ValueError(f"{operation}: {name}: wanted {wanted}, got {got}")


def _result(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _wide_sums(value_N: Tensor, lengths_S: Tensor, validate: bool) -> Tensor:
    """(S,) fp64."""
    if not len(value_N) and not len(lengths_S):  # a batch without pairs: segment_reduce wants a segment
        return value_N.double()
    try:
        return torch.segment_reduce(value_N.double(), "sum", lengths=lengths_S, axis=0, unsafe=not validate)
    except RuntimeError:  # no room on the device is one too
        if not validate:
            raise
        total, least = (int(lengths_S.sum()), int(lengths_S.min())) if len(lengths_S) else (0, 0)
        if total == len(value_N) and least >= 0:
            raise
        got = total if least >= 0 else f"one of {least}"
        raise ValueError(f"lengths_S: wanted lengths that add up to {len(value_N)} rows, got {got}") from None


def _heads(value_N: Tensor, lengths_S: Tensor, pairs_P2: Tensor, shared_P: Tensor) -> Tensor:
    """(P, 2) fp64 sums of the first `shared_P` tokens of both answers of every pair.

    The rows are cut where an answer starts and where a pair's head ends, into S + 2P pieces, a number the host knows; a head is
    the sum of the pieces inside it.
    """
    start_S = lengths_S.cumsum(0) - lengths_S
    first_K = start_S[pairs_P2].reshape(-1, 1)
    end_K = first_K + shared_P[:, None].expand(-1, 2).reshape(-1, 1)
    edge_J = torch.cat([start_S, end_K[:, 0]]).sort().values
    length_J = torch.cat([edge_J[1:], edge_J.new_full((1,), len(value_N))]) - edge_J
    piece_J = _wide_sums(value_N, length_J, validate=False)
    inside_KJ = (edge_J >= first_K) & (edge_J < end_K)
    return torch.where(inside_KJ, piece_J, 0.0).sum(1).view(-1, 2)


def preference_logps(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, lengths_S: Tensor, **options: Any
) -> Tensor:
    """fp32 (S,) log-probs of whole sequences: `linear_logprob` summed over consecutive stretches of `lengths_S` rows.

    Ignored rows (-100) count as rows of their sequence and add 0. `options` are `linear_logprob`'s.
    """
    return sequence_sums(linear_logprob(hidden_ND, weight_VD, target_N, **options).logprob, lengths_S)
