"""A study whose files were damaged after its runs: the file is named in one sentence, or what is told stays the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError
from fasttrain.study.notes import Attempt, begin
from fasttrain.study.page import write_page
from fasttrain.study.results import collect, write_results
from fasttrain.study.table import cost_lines, findings, table_lines
from fasttrain.study.tasks import tasks_of


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content.rstrip()[:-1],
    "a bit flipped": _flip,
    "another kind": lambda content: b"[1]\n",
    "another object": lambda content: b'{"command": 1, "pairs": "x", "step": "9"}\n',
    "zeros": lambda content: bytes(len(content)),
}


def _told(study: Any, out: Path) -> str:
    """All that a start with --report tells, and which steps a start without would do."""
    results = collect(study)
    write_results(results, out / "results.json")
    write_page(results, out)
    lines = [
        *table_lines(results),
        *findings(results),
        *cost_lines(results),
        (out / "results.json").read_text(),
    ]
    return "\n".join(lines) + str([task.is_done() for task in tasks_of(study)])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_a_study_is_named_or_seen_as_not_done(
    damage: str, finished: Any, tmp_path: Path
) -> None:
    out = tmp_path / "page"
    out.mkdir()
    for task in tasks_of(finished):
        task.note.write_text(json.dumps({"command": task.shown, "inputs": task.read(), "seconds": 90.0}))
    whole = _told(finished, out)
    files = [path for path in [*finished.output.rglob("*"), tmp_path / "a.jsonl"] if path.is_file()]
    assert len(files) > 20
    for path in (path for path in files if path.stat().st_size):
        sound, before = path.read_bytes(), path.stat()
        times = before.st_atime_ns, before.st_mtime_ns
        path.write_bytes(DAMAGE[damage](sound))
        os.utime(path, ns=times)
        try:
            assert _told(finished, out) == whole or collect(finished).outdated, path
        except UserError as error:
            assert str(path) in str(error), error
        path.write_bytes(sound)
        os.utime(path, ns=times)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_note_of_an_attempt_is_named(damage: str, finished: Any) -> None:
    task = tasks_of(finished)[0]
    attempt = asdict(begin(task))
    task.tried.write_bytes(DAMAGE[damage](json.dumps(attempt).encode()))
    for ask in (task.is_done, lambda: begin(task)):
        with pytest.raises(UserError, match=r"the study's note is damaged .*; delete it") as told:
            ask()
        assert str(task.tried) in str(told.value)
    task.tried.write_text(json.dumps(attempt))
    assert isinstance(begin(task), Attempt)
