"""Which answers of one prompt become chosen and rejected."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fasttrain_data.pairs.scores import ROUNDING

Rejected = Literal["random", "lowest", "all"]


@dataclass(frozen=True)
class Choice:
    """Indices of one pair's answers and their scores."""

    chosen: int
    rejected: int
    score_chosen: float
    score_rejected: float


def choose(
    scores: Sequence[float],
    margin: float,
    rejected: Rejected,
    rng: random.Random,
    counts: Sequence[int] | None = None,
) -> list[Choice]:
    """The pairs of one prompt, none when no answer is `margin` below the best.

    Chosen is the first answer with the highest score. Rejected is one of those at least `margin` lower: a
    random one (an answer sampled `counts[i]` times is as likely as that many answers), the first lowest one,
    or each of them in turn. This is the rule of arXiv 2402.10884 with margin 2, made repeatable by `rng`.
    """
    if not scores:
        return []
    best = max(scores)
    chosen = scores.index(best)
    enough = best - margin + min(ROUNDING, margin / 2)  # equal scores are no margin, however small that is
    qualified = [index for index, score in enumerate(scores) if score <= enough]
    qualified = [index for index in qualified if index != chosen]
    if not qualified:
        return []
    if rejected == "random":
        weights = [counts[index] for index in qualified] if counts else None
        picked = rng.choices(qualified, weights)
    elif rejected == "lowest":
        picked = [min(qualified, key=lambda index: scores[index])]
    else:
        picked = qualified
    return [Choice(chosen, index, best, scores[index]) for index in picked]
