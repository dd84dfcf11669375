"""A JSON-lines file as rows one can fetch by number: indexed by byte offset and memory-mapped."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.bad_row import BadRow
from fasttrain.errors import UserError

_PIECE = 1 << 22  # bytes of a file that are indexed at a time
_LOOKED_AFTER = 64  # rows from one look at the file's size to the next
_WHITE = b" \t\n\r\x0b\x0c"  # what bytes.strip() takes away


class JsonLines:
    """A JSON-lines file, 12 bytes of index a row."""

    def __init__(self, path: Path, label: str | None = None, unit: str = "line") -> None:
        self.folder, self.label, self.unit = path.parent, label or str(path), unit
        self.passed_over: list[tuple[str, str]] = []
        self.bad: list[BadRow] = []
        self._offsets, self._lines = array("Q"), array("I")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None
        if self._map is not None:
            self._index(self._map)

    def _index(self, content: mmap.mmap) -> None:
        """Note where every line that is not blank begins."""
        first = 0  # the number of the line that begins the piece, from 0
        begin = 0
        while begin < len(content):
            end = (
                content.rfind(b"\n", begin, begin + _PIECE) + 1
                or content.find(b"\n", begin) + 1
                or len(content)
            )
            piece = np.frombuffer(content, np.uint8, end - begin, begin)
            starts = np.r_[0, np.flatnonzero(piece == 10) + 1]
            starts = starts[starts < len(piece)]
            blank = np.isin(piece[starts], np.frombuffer(_WHITE, np.uint8))
            for line in np.flatnonzero(blank).tolist():  # these may be indented
                stop = starts[line + 1] if line + 1 < len(starts) else len(piece)
                blank[line] = not content[begin + starts[line] : begin + stop].strip()
            self._offsets.frombytes((starts[~blank] + begin).astype(np.uint64).tobytes())
            self._lines.frombytes((np.flatnonzero(~blank) + first + 1).astype(np.uint32).tobytes())
            first += len(starts)
            begin = end

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, number: int) -> str:
        return f"{self.label} {self.unit} {self._lines[number]}"

    def _content(self) -> mmap.mmap:
        """The mapped file; UserError if it was cut meanwhile: the system ends a process that reads what is gone."""
        assert self._map is not None
        size, now = len(self._map), self._map.size()
        if now < size:
            raise UserError(
                f"{self.label}: wanted the {size:,} bytes that were there at the start, got a file cut to {now:,}"
            )
        return self._map

    def row(self, number: int) -> dict[str, Any]:
        content = self._content()
        end = content.find(b"\n", self._offsets[number])
        raw = content[self._offsets[number] : end if end >= 0 else None]
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadRow(self.where(number), "row", "UTF-8", f"byte {raw[error.start]:#04x}") from None
        except (ValueError, RecursionError) as error:
            raise BadRow(self.where(number), "row", "a JSON object", json_problem(error)) from None
        if not isinstance(row, dict):
            raise BadRow(self.where(number), "row", "a JSON object", row)
        return row

    def rows(self, start: int, end: int) -> Iterator[dict[str, Any] | BadRow]:
        """Rows from `start` up to `end`, the bad ones as what is wrong with them."""
        content, read, offsets = self._content(), json.JSONDecoder().raw_decode, self._offsets
        for number in range(start, end):
            if number % _LOOKED_AFTER == 0:
                self._content()
            behind = offsets[number + 1] if number + 1 < len(offsets) else None
            try:
                text = content[offsets[number] : behind].decode()
                row, length = read(text)
                if type(row) is dict and (length == len(text) or text[length:].isspace()):
                    yield row
                    continue
            except (ValueError, RecursionError):
                pass
            try:
                yield self.row(number)
            except BadRow as error:
                yield error


def json_problem(error: Exception) -> str:
    """What is wrong with JSON text: bad syntax, a number of thousands of digits, or brackets without end."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return f"invalid JSON ({error.msg if isinstance(error, json.JSONDecodeError) else error})"
