"""The files of a run that grow by a line a step: metrics.jsonl and pair_changes.jsonl, read back. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasttrain.errors import UserError

_LARGEST = 1e300  # no axis spans more: nan, infinity and what is close to it are no numbers


def is_number(value: Any) -> bool:
    """Whether a value that JSON gave can be counted with and drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines, none where there is no file; UserError for one that names no step, or that `read_lines` refuses."""
    lines = read_lines(path) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        step = line.get("step")
        if not is_number(step):
            raise UserError(f"{path} line {number}: step: wanted a number, got {str(step)[:60]!r}")
    return lines


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line; UserError for another line, but a last one that a kill cut short is left out."""
    texts = path.read_bytes().split(b"\n")
    texts = texts if texts[-1] else texts[:-1]
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            value = json.loads(text.decode())
        except (ValueError, RecursionError):
            if number == len(texts):
                break
            raise UserError(f"{path} line {number}: wanted a JSON object, got {_shown(text)}") from None
        if not isinstance(value, dict):
            raise UserError(f"{path} line {number}: wanted a JSON object, got {_shown(text)}")
        lines.append(value)
    return lines


def _shown(text: bytes) -> str:
    return repr(text.decode(errors="backslashreplace")[:60])
