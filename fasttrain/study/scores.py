"""Scores of answers, one number per question, with intervals; exact match here, benchmarks from their results.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.errors import UserError, mistakes_of_data_tools

_DRAWS = 4000


@dataclass(frozen=True)
class Scored:
    """Scores by question, in the order of the questions, and the lengths of the answers in characters."""

    questions: list[str]
    scores: np.ndarray
    chars: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    @property
    def mean_chars(self) -> float:
        return float(self.chars.mean())

    def interval(self) -> tuple[float, float]:
        """95 %: Wilson's for right-or-wrong scores, else a bootstrap over questions with a fixed seed."""
        if np.isin(self.scores, (0, 1)).all():
            return wilson(int(self.scores.sum()), len(self.scores))
        return _bootstrap(self.scores)

    def above(self, other: Scored) -> tuple[float, float, float]:
        """Mean difference on the questions that both answered, with its 95 % interval (paired bootstrap)."""
        mine, theirs = (dict(zip(s.questions, s.scores, strict=True)) for s in (self, other))
        both = [name for name in mine if name in theirs]
        if not both:
            return math.nan, math.nan, math.nan
        difference = np.array([mine[name] - theirs[name] for name in both])
        return float(difference.mean()), *_bootstrap(difference)


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
    given = {str(row["question_id"]): str(row["text"]) for _, row in _rows(answers)}
    missing = [name for name in truths if name not in given]
    if missing:
        raise UserError(f"{answers}: wanted an answer to every question, got none to {missing[0]}")
    names = list(truths)
    right = [float(given[name].strip() == truths[name]) for name in names]
    return Scored(names, np.array(right), np.array([len(given[name]) for name in names], dtype=float))


def read_scored(results: Path) -> Scored:
    """A benchmark's results.jsonl: the mean over a question's rows that have a score."""
    scores: dict[str, list[float]] = {}
    chars: dict[str, list[float]] = {}
    for place, row in _rows(results):
        name, score, length = row.get("question_id"), row.get("score"), row.get("answer_chars")
        if name is None or not isinstance(length, int | float):
            raise UserError(f"{results} {place}: wanted question_id and answer_chars, got {sorted(row)}")
        if score is not None:
            scores.setdefault(str(name), []).append(float(score))
            chars.setdefault(str(name), []).append(float(length))
    if not scores:
        raise UserError(f"{results}: wanted at least one scored answer, got none")
    names = list(scores)
    return Scored(
        names, np.array([np.mean(scores[n]) for n in names]), np.array([np.mean(chars[n]) for n in names])
    )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from fasttrain_data.jsonl import read_rows

    with mistakes_of_data_tools():
        yield from read_rows(path)
