"""Means over judged answers, and the part of scores.json that all judged benchmarks share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fasttrain.evaluate.judging.calls import JudgeCalls
from fasttrain.evaluate.results import Result

PARSE_FAILED = "parse_failed"


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def mean_score(results: Sequence[Result], scale: float = 1.0) -> float | None:
    """Mean over what was scored; None if nothing was."""
    value = mean([result.score for result in results if result.score is not None])
    return None if value is None else value * scale


def mean_chars(results: Sequence[Result]) -> float | None:
    """Mean length of the scored answers, in characters."""
    return mean([result.answer_chars for result in results if result.score is not None])


def shared_scores(bench: str, model: str, score: float | None, results: Sequence[Result]) -> dict[str, Any]:
    """The keys that every judged benchmark's scores.json begins with."""
    excluded = Counter(result.status for result in results if result.score is None)
    return {
        "benchmark": bench,
        "model": model,
        "score": score,
        "n": sum(result.score is not None for result in results),
        "mean_answer_chars": mean_chars(results),
        "excluded": dict(sorted(excluded.items())),
    }


def about_judge(calls: JudgeCalls) -> dict[str, Any]:
    """Which judge answered, in which versions, for how much."""
    options = calls.options
    return {
        "model": options.model,
        "api": options.api,
        "versions": dict(sorted(calls.versions.items())),
        "replies_this_run": calls.replies,
        "spent_usd": round(calls.budget.spent_usd, 6) if calls.budget.price else None,
        "stopped": calls.stopped,
        "notes": sorted(calls.notes),
    }


def file_name(name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "model"
