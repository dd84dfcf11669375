"""results.jsonl: one row per scored answer, written by every benchmark and read by `fasttrain compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain_data.errors import BadRow
from fasttrain_data.jsonl import dump_row, read_rows, write_text

RESULTS = "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One scored answer. score: None when it is excluded; status then says why, "ok" otherwise.

    id: unique in the file. question_id: what a bootstrap draws; several results may share it. answer_chars: length of
    the answer. extra: further columns (POPE: split, label, prediction; LLaVA-Bench: reference_score).
    """

    id: str
    question_id: str | int
    category: str | None
    score: float | None
    answer_chars: int
    status: str = "ok"
    extra: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COLUMNS} | self.extra


_COLUMNS = ("id", "question_id", "category", "score", "answer_chars", "status")


def write_results(folder: Path, results: Sequence[Result]) -> None:
    write_text(folder / RESULTS, "".join(dump_row(result.row()) + "\n" for result in results))


def read_results(path: Path) -> list[Result]:
    """BadRow names the first row that is not such a result."""
    results = []
    for place, row in read_rows(path):
        score, chars, name = row.get("score"), row.get("answer_chars"), row.get("question_id")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise BadRow(path, place, "score", "a number or null", score)
        if isinstance(chars, bool) or not isinstance(chars, int):
            raise BadRow(path, place, "answer_chars", "a whole number", chars)
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise BadRow(path, place, "question_id", "a string or a whole number", name)
        results.append(
            Result(
                id=str(row.get("id", name)),
                question_id=name,
                category=row.get("category"),
                score=score,
                answer_chars=chars,
                status=str(row.get("status", "ok")),
                extra={key: value for key, value in row.items() if key not in _COLUMNS},
            )
        )
    return results
