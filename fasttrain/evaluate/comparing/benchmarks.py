"""What each benchmark's headline is: which parts of a result it needs, and the score of their sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttrain.evaluate.comparing.resampling import Floats, Score
from fasttrain.evaluate.results import Result


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """title: benchmark and measure. best: the highest score there is. binary: whether each question is right or wrong.

    parts: a scored result -> its parts, which are summed over a question's results. stratum: questions are drawn within
    it, and it has parts of its own. unit: what tells that results of several strata are of one question, which is drawn in
    all of them at once; None where the file does not say. score: sums (..., S, K) over strata and parts -> (...).
    setting: scores.json -> what else the scores depend on, in words; only scores with the same compare.
    """

    title: str
    best: float
    decimals: int
    parts: Callable[[Result], tuple[float, ...]]
    score: Score
    stratum: Callable[[Result], str] = lambda result: ""
    unit: Callable[[Result], str | None] = lambda result: None
    setting: Callable[[dict[str, Any]], str] = lambda scores: ""
    binary: bool = False


def _mark(result: Result) -> tuple[float, ...]:
    return (result.score or 0.0, 1.0)


def _mean(scale: float) -> Score:
    def score(sums: Floats) -> Floats:
        return scale * _divide(sums[..., 0, 0], sums[..., 0, 1])

    return score


def _ratio(sums: Floats) -> Floats:
    return 100 * _divide(sums[..., 0, 0], sums[..., 0, 1])


def _mean_f1(sums: Floats) -> Floats:
    """F1 of "yes" in each split, averaged: the figure of the paper."""
    hits, false_alarms, misses = sums[..., 0], sums[..., 1], sums[..., 2]
    answered = 2 * hits + false_alarms + misses
    f1 = np.divide(2 * hits, answered, out=np.zeros_like(answered), where=answered > 0)
    return np.asarray(f1.mean(axis=-1))


def _confusion(result: Result) -> tuple[float, ...]:
    label, said = result.extra["label"] == "yes", result.extra["prediction"] == "yes"
    return (float(label and said), float(said and not label), float(label and not said))


def _said(*settings: tuple[str, str]) -> Callable[[dict[str, Any]], str]:
    """(words, name): what scores.json holds under each name; files of earlier versions may not have it."""
    return lambda scores: ", ".join(
        f"{words} {scores.get(name, 'what the file does not say')}" for words, name in settings
    )


def _rotations(scores: dict[str, Any]) -> str:
    """Whether options were rotated: how often depends on how many a question has."""
    return "not rotated" if scores.get("rotations") == 1 else "rotated"


def _divide(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)


_JUDGED = (("the judge's temperature", "judge_temperature"), ("the judge's prompt has hash", "judge_prompt"))
BENCHMARKS = {
    "mt-bench": Benchmark(
        title="MT-Bench", best=10, decimals=2, parts=_mark, score=_mean(1), setting=_said(*_JUDGED)
    ),
    "mt-bench-pairs": Benchmark(
        title="MT-Bench pairs, % won",
        best=100,
        decimals=1,
        parts=_mark,
        score=_mean(100),
        setting=_said(("against", "baseline"), *_JUDGED),
    ),
    "mm-vet": Benchmark(
        title="MM-Vet",
        best=100,
        decimals=1,
        parts=_mark,
        score=_mean(100),
        setting=_said(*_JUDGED),
    ),
    "llava-bench": Benchmark(
        title="LLaVA-Bench, % of reference",
        best=100,
        decimals=1,
        parts=lambda result: (result.score or 0.0, float(result.extra["reference_score"])),
        score=_ratio,
        setting=_said(("the judge told", "judge_system"), *_JUDGED),
    ),
    "pope": Benchmark(
        title="POPE, mean F1",
        best=1,
        decimals=3,
        parts=_confusion,
        score=_mean_f1,
        stratum=lambda result: str(result.extra["split"]),
        unit=lambda result: result.extra.get("asked"),
        binary=True,
    ),
    "mmbench": Benchmark(
        title="MMBench, % right",
        best=100,
        decimals=1,
        parts=_mark,
        score=_mean(100),
        setting=_rotations,
        binary=True,
    ),
    "alpaca-eval": Benchmark(
        title="AlpacaEval 1, % won",
        best=100,
        decimals=1,
        parts=_mark,
        score=_mean(100),
        setting=_said(("against", "reference"), *_JUDGED),
    ),
}
