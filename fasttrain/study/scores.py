"""Scores of answers with intervals: exact match here, benchmarks by their own figure as `fasttrain compare` has it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.evaluate.comparing.analysis import ScoreRow, compare_pair, score_row
from fasttrain.evaluate.comparing.folders import Evaluation, read_evaluation

_DRAWS = 4000


class Score(Protocol):
    """A model's score in one evaluation. measure: what `value` is. decimals: how many of it are shown. count: questions."""

    @property
    def measure(self) -> str: ...
    @property
    def decimals(self) -> int: ...
    @property
    def value(self) -> float: ...
    @property
    def count(self) -> int: ...
    @property
    def mean_chars(self) -> float: ...

    def interval(self) -> tuple[float, float]:
        """95 %; nan where there is none."""

    def above(self, other: Any) -> tuple[float, float, float]:
        """Difference to another model's score in the same evaluation, on the questions of both, with its 95 % interval."""


@dataclass(frozen=True)
class Scored:
    """Right or wrong by question, in the order of the questions, and the lengths of the answers in characters."""

    questions: list[str]
    scores: np.ndarray
    chars: np.ndarray
    measure: str = "share right"
    decimals: int = 3

    @property
    def value(self) -> float:
        return float(self.scores.mean())

    @property
    def count(self) -> int:
        return len(self.questions)

    @property
    def mean_chars(self) -> float:
        return float(self.chars.mean())

    def interval(self) -> tuple[float, float]:
        """95 %, Wilson's."""
        return wilson(int(self.scores.sum()), len(self.scores))

    def above(self, other: Scored) -> tuple[float, float, float]:
        """Mean difference on the questions that both answered, with its 95 % interval (paired bootstrap)."""
        mine, theirs = (dict(zip(s.questions, s.scores, strict=True)) for s in (self, other))
        both = [name for name in mine if name in theirs]
        if not both:
            return math.nan, math.nan, math.nan
        difference = np.array([mine[name] - theirs[name] for name in both])
        return float(difference.mean()), *_bootstrap(difference)


@dataclass(frozen=True, eq=False)
class BenchmarkScored:
    """An evaluation by `fasttrain eval`, and its row in a comparison; told apart by identity."""

    evaluation: Evaluation
    row: ScoreRow

    @property
    def measure(self) -> str:
        return self.evaluation.benchmark.title

    @property
    def decimals(self) -> int:
        return self.evaluation.benchmark.decimals

    @property
    def value(self) -> float:
        return self.row.score

    @property
    def count(self) -> int:
        return self.row.questions

    @property
    def mean_chars(self) -> float:
        return self.row.mean_answer_chars

    def interval(self) -> tuple[float, float]:
        return self.row.interval

    def above(self, other: BenchmarkScored) -> tuple[float, float, float]:
        return _difference(self, other)


@cache  # page, table and results.json ask for the same ones
def _difference(ours: BenchmarkScored, theirs: BenchmarkScored) -> tuple[float, float, float]:
    test = compare_pair(ours.evaluation, theirs.evaluation)
    return (test.difference, *test.interval) if test else (math.nan, math.nan, math.nan)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a share (Wilson, JASA 1927); its ends are exact at none and at all."""
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    return 0.0 if right == 0 else max(0.0, centre - half), 1.0 if right == total else min(1.0, centre + half)


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean; 4,000 draws with a fixed seed, so that a page made again says the same."""
    random = np.random.default_rng(0)
    means = [values[random.integers(0, len(values), len(values))].mean() for _ in range(_DRAWS)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def right_answers(questions: Path) -> dict[str, str]:
    """By the question's name, as `fasttrain answer` gives it; UserError for a question that cannot be scored exactly."""
    from fasttrain.answering.questions import question_name

    truths: dict[str, str] = {}
    for number, (place, row) in enumerate(_rows(questions), start=1):
        truth = row.get("answer", row.get("reference_answer"))
        if not isinstance(truth, str):
            raise UserError(f"{questions} {place}: answer: wanted the right answer as text, got {truth!r}")
        if row.get("turns") is not None:
            raise UserError(f"{questions} {place}: turns: wanted one question, got turns")
        name = str(question_name(row, number))
        if name in truths:
            raise UserError(f"{questions} {place}: question_id: wanted an id of its own, got {name!r} again")
        truths[name] = truth.strip()
    if not truths:
        raise UserError(f"{questions}: wanted at least one question, got none")
    return truths


def score_exactly(questions: Path, answers: Path) -> Scored:
    """1 where the answer is the question's `answer` word for word, spaces at its ends aside; else 0."""
    truths = right_answers(questions)
    given: dict[str, str] = {}
    for place, row in _rows(answers):
        for name in ("question_id", "text"):
            if row.get(name) is None:
                raise UserError(
                    f"{answers} {place}: {name}: wanted one, as fasttrain answer writes, got none"
                )
        given[str(row["question_id"])] = str(row["text"])
    missing = [name for name in truths if name not in given]
    if missing:
        raise UserError(f"{answers}: wanted an answer to every question, got none to {missing[0]}")
    names = list(truths)
    right = [float(given[name].strip() == truths[name]) for name in names]
    return Scored(names, np.array(right), np.array([len(given[name]) for name in names], dtype=float))


def read_benchmark(folder: Path, model: str) -> BenchmarkScored:
    """What `fasttrain eval` wrote into a folder; UserError names what is missing or broken there."""
    evaluation = read_evaluation(folder, model)
    return BenchmarkScored(evaluation, score_row(evaluation))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from fasttrain_data.jsonl import read_rows

    with mistakes_of_data_tools():
        yield from read_rows(path)
