"""Intervals and paired tests by resampling questions, for any score that is a function of sums over questions.

A question is a row of parts, (Q, K): its marks and their count, or its hits and misses. A score is f of the parts'
sums. Questions with equal rows are exchangeable, so a resample is one multinomial (or binomial) draw of how often each
distinct row occurs: exact, and as cheap as the number of distinct rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Score = Callable[[Floats], Floats]  # sums (..., K) -> scores (...); nan where a score has no meaning
_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Model minus baseline on the questions both have.

    interval: percentile bootstrap, questions drawn in pairs. p_value: two-sided, by swapping the two models' answers
    at random question by question. mcnemar: exact, None unless every question is right or wrong.
    """

    n: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    mcnemar: float | None = None


def bootstrap_interval(
    strata: Sequence[Floats], score: Score, *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of score(sums of parts); questions are drawn within each stratum (Q_i, K)."""
    rng = np.random.default_rng(seed)
    sums_BK = sum(_bootstrap_sums(parts, resamples, rng) for parts in strata)
    return _interval(score(np.asarray(sums_BK)), level)


def paired_test(
    ours: Sequence[Floats],
    theirs: Sequence[Floats],
    score: Score,
    *,
    resamples: int,
    seed: int,
    right: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None,
    level: float = 0.95,
) -> PairedTest:
    """ours, theirs: strata with the same questions in the same rows. right: whether each question was right, of both."""
    rng = np.random.default_rng(seed)
    both = [np.concatenate(pair, axis=1) for pair in zip(ours, theirs, strict=True)]
    width = ours[0].shape[1]
    total_2K = np.asarray(sum(parts.sum(axis=0) for parts in both))
    difference = float(score(total_2K[:width]) - score(total_2K[width:]))
    drawn_B2K = np.asarray(sum(_bootstrap_sums(parts, resamples, rng) for parts in both))
    interval = _interval(score(drawn_B2K[:, :width]) - score(drawn_B2K[:, width:]), level)
    swapped_BK = np.asarray(sum(_swap_sums(parts, width, resamples, rng) for parts in both))
    null_B = score(total_2K[:width] + swapped_BK) - score(total_2K[width:] - swapped_BK)
    null_B = null_B[np.isfinite(null_B)]
    # the observed difference is one of the swaps; differences that are equal but for rounding count as equal
    extreme = int((np.abs(null_B) >= abs(difference) * (1 - 1e-9) - 1e-12).sum())
    p_value = (1 + extreme) / (1 + len(null_B)) if math.isfinite(difference) else math.nan
    return PairedTest(
        n=sum(len(parts) for parts in both),
        difference=difference,
        interval=interval,
        p_value=p_value,
        mcnemar=mcnemar_exact(*right) if right is not None else None,
    )


def mcnemar_exact(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    """Two-sided exact p-value of the questions that only one of two models got right (binomial, one half)."""
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    n, k = only_ours + only_theirs, min(only_ours, only_theirs)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / (1 << n))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (Holm 1979); nan stays nan and counts."""
    order = sorted(range(len(p_values)), key=lambda i: (math.isnan(p_values[i]), p_values[i]))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        if not math.isnan(p_values[index]):
            highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
            corrected[index] = highest
    return corrected


def _bootstrap_sums(parts_QK: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Sums (B, K) of as many questions drawn with replacement."""
    rows_UK, counts_U = np.unique(parts_QK, axis=0, return_counts=True)
    n = len(parts_QK)
    return _in_chunks(resamples, len(rows_UK), lambda b: rng.multinomial(n, counts_U / n, size=b) @ rows_UK)


def _swap_sums(parts_Q2K: Floats, width: int, resamples: int, rng: np.random.Generator) -> Floats:
    """What the first model's sums (B, K) gain when each question's two answers change places with chance one half."""
    gain_QK = parts_Q2K[:, width:] - parts_Q2K[:, :width]
    rows_UK, counts_U = np.unique(gain_QK, axis=0, return_counts=True)
    size = len(rows_UK)
    return _in_chunks(resamples, size, lambda b: rng.binomial(counts_U, 0.5, size=(b, size)) @ rows_UK)


def _in_chunks(total: int, width: int, draw: Callable[[int], Floats]) -> Floats:
    """draw(b) for pieces of `total` whose b x width numbers fit in little memory."""
    step = max(1, _DRAWS_AT_ONCE // max(1, width))
    return np.concatenate([draw(min(step, total - start)) for start in range(0, total, step)])


def _interval(values_B: Floats, level: float) -> tuple[float, float]:
    values_B = values_B[np.isfinite(values_B)]
    if not len(values_B):
        return math.nan, math.nan
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
