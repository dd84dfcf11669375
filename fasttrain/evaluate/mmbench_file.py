"""MMBench's table: one row per question and rotation, the image in a cell, read as a stream into a spool on disk."""

from __future__ import annotations

import base64
import binascii
import csv
import os
import string
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fasttrain.answering.questions import ImageSource
from fasttrain.data.bad_row import BadRow
from fasttrain.data.pairs import read_prompt
from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.evaluate.mmbench_score import ROTATION, base_index, rotated
from fasttrain.files import cache_root, naming

_LONGEST_REFERENCE = 64  # a shorter image cell is the index of the row that holds the image
_LONGEST_CELL = 1 << 27  # of base64: larger than any image that is opened
_EMPTY = {"", "nan"}


@dataclass(frozen=True, kw_only=True)
class MMBenchRow:
    """answer: a letter of `options`, None in a test split. in_file: whether the file has the row, or we rotated it."""

    where: str
    index: int
    question: str
    hint: str
    options: dict[str, str]
    answer: str | None
    category: str | None
    image: ImageSource | None
    in_file: bool = True

    @property
    def base(self) -> int:
        return base_index(self.index)


@dataclass(frozen=True)
class SpooledImage:
    """An image's bytes in an unlinked temporary file, which lives as long as one of its images."""

    spool: Spool
    offset: int
    size: int
    label: str

    def read(self) -> bytes:
        return os.pread(self.spool.handle, self.size, self.offset)

    def name(self) -> str:
        return self.label


class Spool:
    """Decoded images on disk, equal ones once: rotated rows repeat theirs."""

    def __init__(self) -> None:
        self._folder = cache_root() / "spool"
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            self.handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.handle)  # with the last image that holds on to the spool
        self._end, self._known = 0, dict[bytes, tuple[int, int]]()

    def add(self, content: bytes, label: str) -> SpooledImage:
        digest = blake2b(content, digest_size=16).digest()
        if digest not in self._known:
            with naming(self._folder), os.fdopen(os.dup(self.handle), "ab") as file:
                file.write(content)
            self._known[digest] = (self._end, len(content))
            self._end += len(content)
        return SpooledImage(self, *self._known[digest], label)


def read_rows(path: Path, images: bool = True) -> list[MMBenchRow]:
    """All rows of the file, in order; UserError names the first that is broken. Without `images` those are not decoded.

    A table; or JSON lines with the same names, `options` an object and `image` a file beside it.
    """
    if path.suffix != ".tsv":
        return list(_json_rows(path, images))
    rows: list[MMBenchRow] = []
    cells_of: dict[int, str] = {}
    spool = Spool()
    references: dict[int, str] = {}
    held: dict[str, SpooledImage] = {}
    for where, cells in _cells(path):
        row = _row(where, cells)
        if row.index in cells_of:
            raise BadRow(
                where, "index", f"an index of its own, {cells_of[row.index]} has it too", str(row.index)
            )
        cells_of[row.index] = where
        cell = cells.get("image", "")
        if images and len(cell) > _LONGEST_REFERENCE:
            held[str(row.index)] = spool.add(_decode(cell, where), f"image of index {row.index}")
            row = replace(row, image=held[str(row.index)])
        elif images:
            references[len(rows)] = cell
        rows.append(row)
    for number, cell in references.items():
        if cell not in held:
            raise BadRow(rows[number].where, "image", "base64, or the index of a row with an image", cell)
        rows[number] = replace(rows[number], image=held[cell])
    if not rows:
        raise UserError(f"{path}: wanted at least one question, got none")
    return rows


def _json_rows(path: Path, images: bool) -> Iterator[MMBenchRow]:
    from fasttrain_data.jsonl import read_rows as read_json

    seen: dict[int, str] = {}
    with mistakes_of_data_tools():
        rows = [(f"{path} {place}", row) for place, row in read_json(path)]
    for where, given in rows:
        options = given.get("options")
        if not isinstance(options, dict):
            raise BadRow(where, "options", 'an object {"A": ..., "B": ...}', options)
        row = _row(
            where, {name: str(value) for name, value in {**given, **options}.items() if value is not None}
        )
        if row.index in seen:
            raise BadRow(where, "index", f"an index of its own, {seen[row.index]} has it too", str(row.index))
        seen[row.index] = where
        if images:
            found = read_prompt(given, row.question, where, path.parent)[1]
            if len(found) != 1:
                raise BadRow(where, "image", "one image", str(len(found)))
            row = replace(row, image=found[0])
        yield row


def with_rotations(rows: list[MMBenchRow]) -> list[MMBenchRow]:
    """The rows, with the rotations of every question if the file has none of its own."""
    if any(row.index >= ROTATION for row in rows):
        return rows
    result = []
    for row in rows:
        result.append(row)
        for turn in range(1, len(row.options)):
            options, answer = rotated(row.options, row.answer, turn)
            index = row.index + turn * ROTATION
            result.append(replace(row, index=index, options=options, answer=answer, in_file=False))
    return result


def _cells(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, cells by column); the place counts rows, since a quoted cell may hold line breaks."""
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        try:
            columns = next(reader, [])
            for name in ("index", "question", "A", "B"):
                if name not in columns:
                    raise UserError(
                        f"{path}: wanted MMBench's columns, got none called {name!r} among {columns[:12]}"
                    )
            for number, cells in enumerate(filter(None, reader), start=1):  # a blank line is no row
                where = f"{path} row {number}"
                if len(cells) != len(columns):
                    raise BadRow(where, "row", f"{len(columns)} cells", f"{len(cells)}")
                yield where, dict(zip(columns, cells))
        except csv.Error as error:
            raise UserError(
                f"{path} line {reader.line_num}: wanted tab-separated values, got {error}"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: wanted UTF-8, got byte {error.object[error.start]:#04x}") from None


def _row(where: str, cells: dict[str, str]) -> MMBenchRow:
    for name in ("index", "question"):
        if name not in cells:
            raise BadRow(where, name, "a value", None)
    try:
        index = int(float(cells["index"])) if "." in cells["index"] else int(cells["index"])
    except (ValueError, OverflowError):
        raise BadRow(where, "index", "an integer", cells["index"]) from None
    options = {
        letter: cells[letter]
        for letter in string.ascii_uppercase
        if cells.get(letter, "").strip().lower() not in _EMPTY
    }
    if len(options) < 2 or not cells["question"].strip():
        raise BadRow(where, "question", "a question with at least two options", f"{len(options)} option(s)")
    answer = cells.get("answer", "").strip()
    if answer.lower() in _EMPTY:
        answer = ""
    if answer and answer not in options:
        raise BadRow(where, "answer", f"one of {', '.join(options)}", answer)
    hint, category = cells.get("hint", ""), cells.get("category", "")
    return MMBenchRow(
        where=where,
        index=index,
        question=cells["question"],
        hint="" if hint.strip().lower() in _EMPTY else hint,
        options=options,
        answer=answer or None,
        category=None if category.strip().lower() in _EMPTY else category,
        image=None,
    )


def _decode(cell: str, where: str) -> bytes:
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        raise BadRow(where, "image", "an image in base64", "broken base64") from None


def rows_by_question(rows: list[MMBenchRow]) -> dict[int, list[MMBenchRow]]:
    """Rows of each question, in the order of their rotations."""
    groups: dict[int, list[MMBenchRow]] = {}
    for row in rows:
        groups.setdefault(row.base, []).append(row)
    return {base: sorted(group, key=lambda row: row.index) for base, group in groups.items()}


def submission_cells(row: MMBenchRow, prediction: str) -> dict[str, Any]:
    """A row of the official site's spreadsheet."""
    options = {letter: row.options.get(letter, "") for letter in "ABCD"}
    more = {letter: text for letter, text in row.options.items() if letter not in options}
    return {"index": row.index, "question": row.question, **options, **more, "prediction": prediction}
