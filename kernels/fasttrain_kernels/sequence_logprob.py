"""Per-token values to sequences and pairs: sums, length-desensitised sums (LD-DPO), WPO weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear_logprob import linear_logprob


def sequence_sums(value_N: Tensor, lengths_S: Tensor) -> Tensor:
    """(S,) fp32 (fp64) sums of consecutive stretches of value_N (N,); lengths_S int64 (S,) add up to N.

    Summed in fp64 and in order, so a sequence's sum does not depend on its neighbours.
    """
    total = torch.segment_reduce(value_N.double(), "sum", lengths=lengths_S.to(value_N.device), axis=0)
    return total.to(_result(value_N))


def pair_sums(
    value_N: Tensor, lengths_S: Tensor, pairs_P2: Tensor, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sums over the chosen and the rejected answer of every pair: (P,), (P,).

    Args:
        value_N: (N,) log-prob per token, completion by completion; policy's or reference's.
        lengths_S: int64 (S,) tokens per completion.
        pairs_P2: int64 (P, 2) indices of the chosen and the rejected completion.
        ld_alpha: LD-DPO (Liu et al., arXiv 2409.06411): in each pair the first min(Lc, Lr) tokens of both answers count
            fully, the rest times ld_alpha. None, or 1.0: the plain sum.
    """
    if ld_alpha is None:
        sums_S = sequence_sums(value_N, lengths_S)
        return sums_S[pairs_P2[:, 0]], sums_S[pairs_P2[:, 1]]
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"pair_sums: ld_alpha: wanted a number in [0, 1] or None, got {ld_alpha}")
    full_P2 = _stretches(value_N, _starts(lengths_S)[pairs_P2], lengths_S[pairs_P2])
    shared_P = lengths_S[pairs_P2].amin(1)
    head_P2 = _stretches(value_N, _starts(lengths_S)[pairs_P2], shared_P[:, None].expand(-1, 2))
    chosen_P, rejected_P = (head_P2 + ld_alpha * (full_P2 - head_P2)).to(_result(value_N)).unbind(1)
    return chosen_P, rejected_P


@torch.no_grad()
def wpo_weights(logp_N: Tensor, log_p2_N: Tensor, lengths_S: Tensor, pairs_P2: Tensor) -> Tensor:
    """(P,) weight of each pair, no gradient: WPO, Zhou et al., arXiv 2406.11827, eq. 2.

    w = exp(mean over tokens of (logp - log sum_v p_v^2)) per answer; a pair's weight is the product of its two.
    """
    mean_S = sequence_sums(logp_N.double() - log_p2_N.double(), lengths_S) / lengths_S.clamp(min=1)
    return mean_S[pairs_P2].sum(1).exp().to(_result(logp_N))


def _result(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _stretches(value_N: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """fp64 sums of value_N[start : start + length], for index tensors of any one shape."""
    flat_start, flat_length = start.reshape(-1), length.reshape(-1)
    offset = torch.arange(int(flat_length.sum()), device=value_N.device) - _starts(
        flat_length
    ).repeat_interleave(flat_length)
    rows = flat_start.repeat_interleave(flat_length) + offset
    picked = value_N.double().index_select(0, rows)
    return torch.segment_reduce(picked, "sum", lengths=flat_length, axis=0).view(start.shape)


def preference_logps(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, lengths_S: Tensor, **options: Any
) -> Tensor:
    """fp32 (S,) log-probs of whole sequences: `linear_logprob` summed over consecutive stretches of `lengths_S` rows.

    Ignored rows (-100) count as rows of their sequence and add 0. `options` are `linear_logprob`'s.
    """
    return sequence_sums(linear_logprob(hidden_ND, weight_VD, target_N, **options).logprob, lengths_S)
