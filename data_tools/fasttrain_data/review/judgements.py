"""Judgements on disk: one JSON line each, appended and synced before anyone is told that it is kept."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fasttrain_data.errors import BadRow
from fasttrain_data.jsonl import Row, dump_row, finite_number, naming, parse_line
from fasttrain_data.records import now

Verdict = Literal["left", "right", "tie", "skip"]
VERDICTS: tuple[Verdict, ...] = ("left", "right", "tie", "skip")


_BEGINNING = b'{"id": '


def reviews_path(pairs: Path) -> Path:
    return pairs.with_name(f"{pairs.stem}.reviews.jsonl")


class Judgements:
    """The file and what stands: by reviewer and pair the last judgement that was not taken back.

    Nothing is ever rewritten: taking back appends a line too. A line that a crash cut short is left as it is and passed
    over; the next one starts on a line of its own. Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._standing: dict[str, dict[str, Row]] = {}
        for row in read_judgements(path):
            self._apply(row)

    def of(self, rater: str) -> dict[str, Row]:
        """Standing judgements of a reviewer by pair, oldest first."""
        with self._lock:
            return dict(self._standing.get(rater, {}))

    def standing(self) -> list[Row]:
        with self._lock:
            return [row for rows in self._standing.values() for row in rows.values()]

    def raters(self) -> list[str]:
        with self._lock:
            return [rater for rater, rows in self._standing.items() if rows]

    def append(self, row: Row) -> None:
        """Keep one judgement, or one taken back (`undone`); it is on disk when this returns."""
        row = {**row, "created": now()}
        with self._lock:
            self._write(row)
            self._apply(row)

    def _apply(self, row: Row) -> None:
        rows = self._standing.setdefault(str(row["rater"]), {})
        rows.pop(str(row["id"]), None)  # a later judgement of the same pair counts as the newest
        if not row.get("undone"):
            rows[str(row["id"])] = row

    def _write(self, row: Row) -> None:
        line = (dump_row(row) + "\n").encode()
        with naming(self.path), self.path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # what is told as not kept is not there at the next start
                raise


def read_judgements(path: Path) -> Iterator[Row]:
    """Every line as it was written; BadRow for a line that is no judgement, except the beginning of one, left by a crash."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip() or _is_cut(raw):
                continue
            row = parse_line(raw, path, f"line {number}")
            _check(row, path, f"line {number}")
            yield row


def _check(row: Row, path: Path, place: str) -> None:
    """BadRow for a judgement whose agreement cannot be reckoned, or that is nobody's or of no pair."""
    for field, wanted in (("id", "a pair's id"), ("rater", "a reviewer's name")):
        if row.get(field) in (None, ""):
            raise BadRow(path, place, field, wanted, row.get(field))
    if row.get("undone"):
        return
    margin, differences = row.get("margin"), row.get("differences")
    numbers = differences.values() if isinstance(differences, dict) else [differences]
    for field, right, wanted in (
        ("verdict", row.get("verdict") in VERDICTS, ", ".join(VERDICTS)),
        ("chosen_side", row.get("chosen_side") in ("left", "right"), "left or right"),
        ("margin", margin is None or finite_number(margin) is not None, "a finite number or null"),
        (
            "differences",
            differences is None or all(finite_number(number) is not None for number in numbers),
            "numbers by attribute",
        ),
    ):
        if not right:
            raise BadRow(path, place, field, wanted, row.get(field))


def _is_cut(raw: bytes) -> bool:
    """The beginning of a line of ours without its end: what a crash leaves while it is written."""
    try:
        json.loads(raw)
    except ValueError:
        if not raw.endswith(b"\n"):  # every writer of lines ends them
            return True
        return raw.startswith(_BEGINNING) or _BEGINNING.startswith(raw.rstrip(b"\n"))
    return False
