"""Rows with the same prompt and the same image bytes become one group.

Image bytes are compared only between rows whose prompts are equal and whose files have equal sizes but different paths, so
indexing a file opens almost no image.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from fasttrain.data.images import ImageRef, hash_bytes
from fasttrain.data.pairs import Pair, read_pair
from fasttrain.data.sources import BadRow, Source, iterate, open_source
from fasttrain.errors import UserError
from fasttrain.files import HashMemo


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
        self.sources: list[Source] = [open_source(Path(path).expanduser()) for path in paths]
        root = None if image_root is None else Path(image_root).expanduser()
        if root is not None and not root.is_dir():
            raise UserError(f"data.image_root: wanted an existing folder, got {image_root!r}")
        self.roots = [root or source.folder for source in self.sources]
        self._starts = np.cumsum([0] + [len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, number: int) -> tuple[int, int]:
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        return index, number - int(self._starts[index])

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
    """Rows by group, groups in order of first appearance: rows of group g are `rows[starts[g]:starts[g+1]]`."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def group(self, number: int) -> np.ndarray:
        return self.rows[self.starts[number] : self.starts[number + 1]]


def group_rows(
    files: PairFiles,
    memo: HashMemo,
    on_bad: Callable[[BadRow], None],
    tick: Callable[[int], object] = lambda n: None,
    seen: Callable[[Pair], object] = lambda pair: None,
) -> GroupIndex:
    """Index every usable row by its group; rows that cannot be used go to `on_bad`, each that could be read to `seen`."""
    finder = _GroupFinder(files, memo, seen)
    row_numbers, row_groups = array("I"), array("I")
    for number in files:
        tick(1)
        try:
            group = finder.group_of(number)
        except BadRow as error:
            on_bad(error)
            continue
        row_numbers.append(number)
        row_groups.append(group)
    groups = np.frombuffer(row_groups, np.uint32) if row_groups else np.zeros(0, np.uint32)
    order = np.argsort(groups, kind="stable")
    rows = np.frombuffer(row_numbers, np.uint32)[order] if row_numbers else np.zeros(0, np.uint32)
    starts = np.searchsorted(groups[order], np.arange(len(finder.first_rows) + 1))
    return GroupIndex(rows.astype(np.int64), starts)


class _GroupFinder:
    """Groups by prompt and image sizes; where two rows agree in both but not in paths, by image contents."""

    def __init__(self, files: PairFiles, memo: HashMemo, seen: Callable[[Pair], object]) -> None:
        self.files, self.memo, self.seen = files, memo, seen
        self.first_rows = array("I")
        self._by_size: dict[bytes, int] = {}
        self._by_content: dict[bytes, int] = {}

    def group_of(self, number: int) -> int:
        """The group of a row, a new one if no row before belongs with it; BadRow if the row cannot be used."""
        pair = self.files.pair(number)
        self.seen(pair)
        key = _key(pair)
        group = self._by_size.get(key)
        if group is None:
            self._by_size[key] = len(self.first_rows)
            return self._new_group(number)
        if not pair.images:
            return group
        first = self.files.pair(self.first_rows[group])
        if pair.images == first.images:
            return group
        self._by_content.setdefault(key + self._hashes(first), group)
        content = key + self._hashes(pair)
        if content not in self._by_content:
            self._by_content[content] = self._new_group(number)
        return self._by_content[content]

    def _new_group(self, number: int) -> int:
        self.first_rows.append(number)
        return len(self.first_rows) - 1

    def _hashes(self, pair: Pair) -> bytes:
        try:
            text = " ".join(image_hash(ref, self.memo) for ref in pair.images)
        except OSError as error:
            raise BadRow(
                pair.where, "images", "a readable image file", f"{error.filename} ({error.strerror})"
            ) from None
        return blake2b(text.encode(), digest_size=16).digest()


def _key(pair: Pair) -> bytes:
    """Equal for rows that may share a group: same prompt, same image sizes in bytes."""
    digest = blake2b(pair.prompt_hash(), digest_size=16)
    for ref in pair.images:
        try:
            digest.update(ref.size().to_bytes(8, "little"))
        except OSError as error:
            raise BadRow(
                pair.where, "images", "a readable image file", f"{ref.name()} ({error.strerror})"
            ) from None
    return digest.digest()


def image_hash(ref: ImageRef, memo: HashMemo) -> str:
    """Content hash of an image; files are read once and remembered by size and modification time."""
    return hash_bytes(ref.content) if ref.content is not None else memo(ref._file())
