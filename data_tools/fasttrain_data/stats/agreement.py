"""Agreement of raters on an ordinal scale: quadratic weighted kappa, Krippendorff's alpha, exact and near agreement.

Cohen 1968 (weighted kappa); Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def quadratic_weighted_kappa(table: np.ndarray) -> float:
    """Kappa of a square table of counts, table[i, j] items rated i by one and j by the other.

    nan when there is nothing to disagree about (one category used by both, or an empty table).
    """
    observed = np.asarray(table, dtype=float)
    levels = np.arange(len(observed))
    weights = (levels[:, None] - levels[None, :]) ** 2
    total = observed.sum()
    if not total:
        return float("nan")
    expected = np.outer(observed.sum(1), observed.sum(0)) / total
    by_chance = float((weights * expected).sum())
    return 1 - float((weights * observed).sum()) / by_chance if by_chance else float("nan")


def within(table: np.ndarray, distance: int) -> float:
    """Share of items whose two ratings differ by at most `distance`; nan for an empty table."""
    levels = np.arange(len(table))
    near = np.abs(levels[:, None] - levels[None, :]) <= distance
    total = table.sum()
    return float(table[near].sum() / total) if total else float("nan")


class Coincidences:
    """Krippendorff's coincidence matrix, filled unit by unit; values are 0 .. levels - 1."""

    def __init__(self, levels: int) -> None:
        self.matrix = np.zeros((levels, levels))

    def add(self, values: Sequence[int]) -> None:
        """One unit's ratings, however many; a unit with fewer than two says nothing."""
        if len(values) < 2:
            return
        counts = np.bincount(values, minlength=len(self.matrix)).astype(float)
        pairs = np.outer(counts, counts) - np.diag(counts)
        self.matrix += pairs / (len(values) - 1)

    def alpha(self, metric: str = "ordinal") -> float:
        """Alpha under the `ordinal`, `interval` or `nominal` metric; nan without variation."""
        totals = self.matrix.sum(1)
        pairable = totals.sum()
        distance = _distances(totals, metric)
        observed = float((self.matrix * distance).sum())
        expected = float((np.outer(totals, totals) * distance).sum())
        return 1 - (pairable - 1) * observed / expected if expected else float("nan")


def _distances(totals: np.ndarray, metric: str) -> np.ndarray:
    """Squared differences between categories; ordinal ones count the values that lie between two."""
    levels = np.arange(len(totals))
    if metric == "nominal":
        return (levels[:, None] != levels[None, :]).astype(float)
    if metric == "interval":
        return (levels[:, None] - levels[None, :]).astype(float) ** 2
    if metric != "ordinal":
        raise ValueError(f"metric: wanted ordinal, interval or nominal, got {metric!r}")
    upto = np.cumsum(totals)
    low, high = np.minimum.outer(levels, levels), np.maximum.outer(levels, levels)
    between = upto[high] - upto[low] + totals[low]
    return (between - (totals[low] + totals[high]) / 2) ** 2


def krippendorff_alpha(units: Iterable[Sequence[int]], levels: int, metric: str = "ordinal") -> float:
    """Alpha of units, each with the ratings it got."""
    coincidences = Coincidences(levels)
    for values in units:
        coincidences.add(values)
    return coincidences.alpha(metric)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation; nan when one side does not vary or fewer than two items are given."""
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def cohen_kappa(table: np.ndarray) -> float:
    """Kappa of a square table of counts on categories without order (Cohen 1960); nan where chance agrees always."""
    observed = np.asarray(table, dtype=float)
    total = observed.sum()
    if not total:
        return float("nan")
    by_chance = float((observed.sum(0) * observed.sum(1)).sum()) / total**2
    return (
        (float(np.trace(observed)) / total - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan")
    )
