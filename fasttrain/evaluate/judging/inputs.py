"""Files a judge needs: found in --data under their official names, read with the faulty row named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.evaluate.judging.options import JudgeOptions
from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.jsonl import Row, read_rows


def find_file(data: Path, names: Sequence[str], what: str, origin: str) -> Path:
    """The first of `names` (patterns) under `data`; UserError says what to put there and where it comes from."""
    if not data.is_dir():
        raise UserError(f"--data: wanted a folder, got {data}")
    for name in names:
        found = sorted(path for path in data.glob(name) if path.is_file())
        if found:
            return found[0]
    raise UserError(f"{data}: wanted {what} as {names[0]}, got no such file; it is {origin}")


def text_of(path: Path, place: str, row: Row, *names: str) -> str:
    """A string field, the first of `names` that is there; BadRow if it is not a string."""
    value = next((row[name] for name in names if name in row), None)
    if not isinstance(value, str):
        raise BadRow(path, place, names[0], "a string", value)
    return value


def texts_of(path: Path, place: str, row: Row, name: str) -> list[str]:
    """A field that is a list of strings."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRow(path, place, name, "a list of strings", value)
    return value


def by_id(path: Path, name: str = "question_id") -> tuple[dict[Any, tuple[str, Row]], int]:
    """({id: (place, row)}, repeated ids): the last row of an id counts, as in FastChat's reader.

    Published answer files hold repeats: a resumed run that only appends writes a question twice.
    """
    found: dict[Any, tuple[str, Row]] = {}
    rows = 0
    for place, row in read_rows(path):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadRow(path, place, name, "a string or a whole number", value)
        found[value] = (place, row)
        rows += 1
    return found, rows - len(found)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that is one object."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: wanted UTF-8, got byte {error.object[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: wanted a JSON object, got {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: wanted a JSON object, got JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: wanted a JSON object, got a {type(value).__name__}")
    return value


@dataclass
class Gaps:
    """missing: questions that an answer file leaves without an answer. unknown: its answers that belong to no question."""

    missing: int = 0
    unknown: int = 0

    def answered(
        self, questions: Iterable[Any], answers: Iterable[Any], path: Path, options: JudgeOptions
    ) -> list[Any]:
        """Ids of the questions to judge, those among the first `options.limit`; what does not fit is counted.

        UserError when no answer fits, and when one is missing without `options.partial`.
        """
        every, there = list(questions), set(answers)
        wanted = every[: options.limit]
        found = [name for name in wanted if name in there]
        if not found:
            which = "" if len(wanted) == len(every) else "first "
            raise UserError(
                f"{path}: wanted answers to the benchmark's questions, got none of its {which}{len(wanted)} ids"
            )
        self.missing = len(wanted) - len(found)
        self.unknown = len(there.difference(every))
        if self.missing and not options.partial:
            first = next(name for name in wanted if name not in there)
            raise UserError(
                f"{path}: wanted an answer to each of {len(wanted)} questions, got none to {self.missing} of "
                f"them, first {first!r}; --partial scores the others"
            )
        return found


def model_name(answers: Path, rows: Iterable[Row], *names: str) -> str:
    """What the answer file calls its model, else the file's name."""
    for row in rows:
        for name in names:
            if isinstance(row.get(name), str) and row[name].strip():
                return str(row[name])
    return answers.stem


def insert(template: str, values: dict[str, str]) -> str:
    """Put values where {name} stands, in one pass; any other brace is text, as AlpacaEval's and MM-Vet's prompts want."""
    names = "|".join(map(re.escape, values))
    return re.sub("{(" + names + ")}", lambda match: values[match[1]], template)


def fill(template: str, values: dict[str, str], path: Path) -> str:
    """str.format with only these names; UserError for a template that asks for others."""
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        wanted = ", ".join("{" + name + "}" for name in values)
        raise UserError(f"{path}: wanted a prompt with {wanted}, got one with {error!s}") from None
