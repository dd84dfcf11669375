"""The rows of pair files by a running number, and their index by group: rows with the same prompt and image bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.bad_row import BadRow
from fasttrain.data.images import ImageRef, hash_bytes
from fasttrain.data.pairs import Pair, read_pair
from fasttrain.data.sources import Source, iterate, open_source
from fasttrain.errors import UserError
from fasttrain.files import HashMemo, user_path


@dataclass(frozen=True)
class Skipped:
    """A row that was left out, for skipped.jsonl."""

    where: str
    id: str | None
    reason: str


class PairFiles:
    """The rows of one or more pair files, fetched by a running number; `read` makes a pair of a row."""

    def __init__(
        self, paths: list[str], image_root: str | None, read: Callable[..., Pair] = read_pair
    ) -> None:
        self._read = read
        self.sources: list[Source] = [open_source(user_path(path)) for path in paths]
        root = None if image_root is None else user_path(image_root)
        if root is not None and not root.is_dir():
            raise UserError(f"data.image_root: wanted an existing folder, got {image_root!r}")
        self.roots = [root or source.folder for source in self.sources]
        self._starts = np.cumsum([0] + [len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, number: int) -> tuple[int, int]:
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        return index, number - int(self._starts[index])

    def rows(self, rows: range) -> Iterator[tuple[int, dict[str, Any] | BadRow, Path]]:
        """Every one of these rows by number, or what is wrong with it, and where its relative image paths start."""
        number = rows.start
        while number < rows.stop:
            index, first = self._locate(number)
            source = self.sources[index]
            last = min(len(source), first + rows.stop - number)
            for row in source.rows(first, last):
                yield number, row, self.roots[index]
                number += 1

    def read(self, row: dict[str, Any], number: int) -> Pair:
        """The pair of row `number`, which is at hand; BadRow if it cannot be used."""
        index, _ = self._locate(number)
        return self._read(row, self.where(number), self.roots[index])

    @property
    def plain(self) -> bool:
        """Whether rows are read as pairs of prompt, chosen and rejected."""
        return self._read is read_pair

    def pair(self, number: int) -> Pair:
        """Row `number` over all files; BadRow if it cannot be used."""
        index, row = self._locate(number)
        source = self.sources[index]
        return self._read(source.row(row), source.where(row), self.roots[index])

    def where(self, number: int) -> str:
        index, row = self._locate(number)
        return self.sources[index].where(row)

    def __iter__(self) -> Iterator[int]:
        for index, row in iterate(self.sources):
            yield int(self._starts[index]) + row


@dataclass(frozen=True)
class GroupIndex:
    """Rows by group, groups in order of first appearance: rows of group g are `rows[starts[g]:starts[g+1]]`.

    Of each of these rows: how many images it has, the most tokens of its prompt with one answer (0: not known), and the most
    of all its answers.
    """

    rows: np.ndarray
    starts: np.ndarray
    images: np.ndarray
    sequence: np.ndarray
    answers: np.ndarray
    appended_end: int = 0  # answers of rows with known bounds that get an end-of-turn token

    def __len__(self) -> int:
        return len(self.starts) - 1

    def group(self, number: int) -> np.ndarray:
        return self.rows[self.starts[number] : self.starts[number + 1]]


def image_hash(ref: ImageRef, memo: HashMemo) -> str:
    """Content hash of an image; files are read once and remembered by size and times."""
    return hash_bytes(ref.content) if ref.content is not None else memo(ref._file())
