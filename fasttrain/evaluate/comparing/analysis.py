"""Evaluations -> a comparison: scores with intervals, lengths, and paired tests against one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fasttrain.errors import UserError, did_you_mean
from fasttrain.evaluate.comparing.benchmarks import BENCHMARKS
from fasttrain.evaluate.comparing.folders import (
    Evaluation,
    Key,
    asked_alone,
    group_units,
    on_what_both_have,
    strata_of,
)
from fasttrain.evaluate.comparing.resampling import (
    Floats,
    PairedTest,
    Score,
    bootstrap_interval,
    holm,
    paired_test,
)
from fasttrain.evaluate.results import Result

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One model on one benchmark. n: scored answers; questions: what was resampled."""

    benchmark: str
    model: str
    score: float
    interval: tuple[float, float]
    mean_answer_chars: float
    n: int
    questions: int
    excluded: dict[str, int]
    categories: dict[str, float]
    judge: str | None


@dataclass(frozen=True, kw_only=True)
class TestRow:
    """A model against the baseline. p_holm: corrected for all rows of the table."""

    __test__ = False  # pytest collects by the name

    benchmark: str
    model: str
    baseline: str
    test: PairedTest
    p_holm: float
    chars_difference: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """models: in the order given, the baseline among them."""

    models: tuple[str, ...]
    baseline: str
    scores: tuple[ScoreRow, ...]
    tests: tuple[TestRow, ...]
    warnings: tuple[str, ...]
    resamples: int
    seed: int

    def benchmarks(self) -> list[str]:
        there = {row.benchmark for row in self.scores}
        return [name for name in BENCHMARKS if name in there]


def compare(
    evaluations: Sequence[Evaluation],
    *,
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Scores, 95 % bootstrap intervals, and every other model against `baseline` (the first one by default)."""
    models = list(dict.fromkeys(evaluation.model for evaluation in evaluations))
    if baseline is not None and baseline not in models:
        raise UserError(
            f"--baseline: wanted one of {', '.join(models)}, got {baseline!r}{did_you_mean(baseline, models)}"
        )
    baseline = baseline or models[0]
    order = {name: index for index, name in enumerate(BENCHMARKS)}
    sorted_by_benchmark = sorted(evaluations, key=lambda e: (order[e.name], models.index(e.model)))
    scores = [score_row(evaluation, resamples=resamples, seed=seed) for evaluation in sorted_by_benchmark]
    tests, warnings = _tests(sorted_by_benchmark, baseline, resamples, seed)
    return Comparison(
        models=tuple(models),
        baseline=baseline,
        scores=tuple(scores),
        tests=tuple(tests),
        warnings=(
            *_judge_warnings(sorted_by_benchmark),
            *_setting_warnings(sorted_by_benchmark),
            *_unit_warnings(sorted_by_benchmark),
            *warnings,
        ),
        resamples=resamples,
        seed=seed,
    )


def score_row(evaluation: Evaluation, *, resamples: int = RESAMPLES, seed: int = 0) -> ScoreRow:
    """The benchmark's own figure, with its 95 % bootstrap interval."""
    strata = strata_of(evaluation)
    score = _flat_score(evaluation, len(evaluation.strata))
    total = np.asarray(sum(parts.sum(axis=0) for parts in strata))
    return ScoreRow(
        benchmark=evaluation.name,
        model=evaluation.model,
        score=float(score(total)),
        interval=bootstrap_interval(strata, score, resamples=resamples, seed=seed),
        mean_answer_chars=evaluation.mean_chars,
        n=len(evaluation.scored),
        questions=sum(map(len, strata)),
        excluded=evaluation.excluded,
        categories=_category_scores(evaluation),
        judge=evaluation.judge,
    )


def _flat_score(evaluation: Evaluation, strata: int) -> Score:
    """The benchmark's score for sums whose strata stand side by side."""

    def score(sums: Floats) -> Floats:
        return evaluation.benchmark.score(sums.reshape(*sums.shape[:-1], strata, -1))

    return score


def _category_scores(evaluation: Evaluation) -> dict[str, float]:
    """The benchmark's score within each category; nothing for benchmarks with strata or a single category."""
    groups: dict[str, list[Result]] = {}
    for result in evaluation.scored:
        if result.category is not None:
            groups.setdefault(result.category, []).append(result)
    if len(groups) < 2 or any(stratum for stratum, _ in evaluation.parts):
        return {}
    benchmark = evaluation.benchmark
    sums = {name: np.sum([benchmark.parts(r) for r in group], axis=0)[None] for name, group in groups.items()}
    return {name: float(benchmark.score(total)) for name, total in sums.items()}


def _tests(
    evaluations: Sequence[Evaluation], baseline: str, resamples: int, seed: int
) -> tuple[list[TestRow], list[str]]:
    by_place = {(evaluation.name, evaluation.model): evaluation for evaluation in evaluations}
    pairs, warnings = [], []
    for ours in evaluations:
        theirs = by_place.get((ours.name, baseline))
        if theirs is None or theirs is ours:
            continue
        if left_out := len(asked_alone(ours, theirs)):
            warnings.append(
                f"{ours.benchmark.title}: {left_out} questions or turns of them were scored for only one of {ours.model} and "
                f"{baseline}; their test leaves them out"
            )
        if (test := compare_pair(ours, theirs, resamples=resamples, seed=seed)) is not None:
            pairs.append((ours, theirs, test))
    corrected = holm([test.p_value for _, _, test in pairs])
    rows = [
        TestRow(
            benchmark=ours.name,
            model=ours.model,
            baseline=baseline,
            test=test,
            p_holm=p_holm,
            chars_difference=ours.mean_chars - theirs.mean_chars,
        )
        for (ours, theirs, test), p_holm in zip(pairs, corrected, strict=True)
    ]
    return rows, warnings


def compare_pair(
    ours: Evaluation, theirs: Evaluation, *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedTest | None:
    """Two models on one benchmark, by the answers that were scored for both; None where there are none."""
    ours, theirs = on_what_both_have(ours, theirs)
    keys = sorted(ours.parts)
    if not keys:
        return None
    units = ours.units if theirs.units else {}
    strata = strata_of(ours, keys, units)
    right = (_right(ours, keys, units), _right(theirs, keys, units)) if ours.benchmark.binary else None
    score = _flat_score(ours, len({stratum for stratum, _ in keys}))
    return paired_test(
        strata, strata_of(theirs, keys, units), score, resamples=resamples, seed=seed, right=right
    )


def _right(evaluation: Evaluation, keys: Sequence[Key], units: dict[Key, str]) -> np.ndarray:
    """Whether each question was right: all of its results."""
    stratum = evaluation.benchmark.stratum
    right: dict[Key, bool] = {}
    for result in evaluation.scored:
        key = (stratum(result), str(result.question_id))
        right[key] = right.get(key, True) and result.score == 1
    return np.array([all(right[key] for key in group) for group in group_units(keys, units)])


def _unit_warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    """Files of earlier versions do not say which questions several splits share."""
    return [
        f"{e.benchmark.title}: {e.folder} does not say which questions its splits share: intervals and p-values count them once "
        "a split and are too narrow; run `fasttrain eval` again"
        for e in evaluations
        if len(e.strata) > 1 and not e.units
    ]


def _judge_warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    """Scores by different judges, or different versions of one, are not comparable."""
    warnings = []
    for name, told in _told_by_benchmark(evaluations, lambda evaluation: evaluation.judge):
        warnings += _difference(name, "the judges", told)
        warnings += [
            f"{BENCHMARKS[name].title}: {model} was judged by several versions ({judge})"
            for model, judge in told.items()
            if "," in judge
        ]
    return warnings


def _setting_warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    """Nor are scores of questions that were asked or judged otherwise."""
    by_benchmark = _told_by_benchmark(evaluations, lambda evaluation: evaluation.setting)
    return [line for name, told in by_benchmark for line in _difference(name, "the settings", told)]


def _told_by_benchmark(
    evaluations: Sequence[Evaluation], tell: Callable[[Evaluation], str | None]
) -> list[tuple[str, dict[str, str]]]:
    """What each benchmark's evaluations say of themselves, by model."""
    names = dict.fromkeys(evaluation.name for evaluation in evaluations)
    return [
        (name, {e.model: told for e in evaluations if e.name == name and (told := tell(e))}) for name in names
    ]


def _difference(name: str, what: str, told: dict[str, str]) -> list[str]:
    if len(set(told.values())) < 2:
        return []
    each = "; ".join(f"{model}: {said}" for model, said in told.items())
    return [f"{BENCHMARKS[name].title}: {what} differ ({each}): these scores do not compare"]


def is_clear(test: PairedTest) -> bool:
    """Whether the difference's interval leaves zero out."""
    low, high = test.interval
    return math.isfinite(low) and (low > 0 or high < 0)
