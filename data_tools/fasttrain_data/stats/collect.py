"""One pass over annotations: counts, scores and lengths, kept as compact arrays."""

from __future__ import annotations

from array import array
from collections import Counter
from itertools import combinations

import numpy as np

from fasttrain_data.records import ATTRIBUTES, Annotation, Call
from fasttrain_data.stats.agreement import Coincidences

_LEVELS = 5


class AnnotationSums:
    """What is kept of annotations: five bytes and a length per answer, a few tables, nothing else."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self._scores = array("b")
        self._chars = array("I")
        self._starts = array("Q", [0])
        self.position_sum = np.zeros(0)
        self.position_best = np.zeros(0)
        self.position_count = np.zeros(0)
        self.vote_tables = np.zeros((len(ATTRIBUTES), _LEVELS, _LEVELS))
        self.recheck_tables = np.zeros((len(ATTRIBUTES), _LEVELS, _LEVELS))
        self.coincidences = [Coincidences(_LEVELS) for _ in ATTRIBUTES]
        self.flips = self.ordered_pairs = 0
        self.versions: Counter[str] = Counter()
        self.usd: float | None = None  # None: no row says what it cost

    def add(self, row: Annotation) -> None:
        self.statuses[row.status] += 1
        self.flags.update(row.flags)
        self.versions[row.model_version or "not recorded"] += 1
        if row.cost_usd is not None:
            self.usd = (self.usd or 0.0) + row.cost_usd
        if row.status != "ok":
            return
        scored = [(completion.scores(), completion.text) for completion in row.completions]
        if any(scores is None for scores, _ in scored):
            self.flags["an answer without scores"] += 1
            return
        for scores, text in scored:
            self._scores.extend(scores or ())
            self._chars.append(len(text))
        self._starts.append(len(self._chars))
        calls = [call for call in row.calls if call.scores is not None]
        for call in calls:
            self._add_positions(call)
        self._add_votes(calls, len(row.completions))

    @property
    def scores(self) -> np.ndarray:
        """int8 (answers, 5)."""
        return np.frombuffer(self._scores, dtype=np.int8).reshape(-1, len(ATTRIBUTES))

    @property
    def chars(self) -> np.ndarray:
        return np.frombuffer(self._chars, dtype=np.uint32)

    @property
    def starts(self) -> np.ndarray:
        """First answer of each prompt, and the number of answers at the end."""
        return np.frombuffer(self._starts, dtype=np.uint64).astype(np.int64)

    def _add_positions(self, call: Call) -> None:
        """Scores by place in the list, as differences from the call's mean."""
        totals = np.array([sum(row[:3]) for row in call.scores or []], dtype=float)
        count = len(totals)
        if count < 2:
            return
        if count > len(self.position_sum):
            grow = count - len(self.position_sum)
            for name in ("position_sum", "position_best", "position_count"):
                setattr(self, name, np.pad(getattr(self, name), (0, grow)))
        best = totals == totals.max()
        self.position_sum[:count] += totals - totals.mean()
        self.position_best[:count] += best / best.sum()
        self.position_count[:count] += 1

    def _add_votes(self, calls: list[Call], answers: int) -> None:
        """Tables of agreement between votes, and between the first vote and a recheck in another order."""
        votes: dict[int, list[list[int] | None]] = {}
        rechecks = set()
        for call in calls:
            ratings = votes.setdefault(call.vote, [None] * answers)
            for index, row in zip(call.order, call.scores or [], strict=True):
                ratings[index] = list(row)
            if call.recheck:
                rechecks.add(call.vote)
        complete = {vote: ratings for vote, ratings in votes.items() if None not in ratings}
        for one, other in combinations(sorted(complete), 2):
            tables = self.recheck_tables if {one, other} & rechecks else self.vote_tables
            _tabulate(tables, complete[one], complete[other])
            self._count_flips(complete[one], complete[other])
        for index in range(answers):
            for attribute, coincidences in enumerate(self.coincidences):
                coincidences.add([(ratings[index] or [])[attribute] for ratings in complete.values()])

    def _count_flips(self, one: list[list[int] | None], other: list[list[int] | None]) -> None:
        """Pairs of answers that one vote puts in the opposite order of the other, by the three-attribute sum."""
        first = [sum((row or [])[:3]) for row in one]
        second = [sum((row or [])[:3]) for row in other]
        for a, b in combinations(range(len(first)), 2):
            if first[a] != first[b]:
                self.ordered_pairs += 1
                self.flips += (first[a] - first[b]) * (second[a] - second[b]) < 0


def _tabulate(tables: np.ndarray, one: list[list[int] | None], other: list[list[int] | None]) -> None:
    """Both directions, so that no vote is the reference."""
    for first, second in zip(one, other, strict=True):
        for attribute, (a, b) in enumerate(zip(first or [], second or [], strict=True)):
            tables[attribute, a, b] += 1
            tables[attribute, b, a] += 1
