"""The first pass over pair files: every row is read and checked, in several processes, and becomes a few numbers.

What is kept of a row is a hash of its prompt and image sizes, hashes of its image paths and of what it begins with, and how many tokens it has at most
(`token_bounds`; 0 where that is not known). Groups are found by sorting the hashes. Image bytes are compared only between rows
whose prompts are equal and whose files have equal sizes but different paths, so the pass opens almost no image.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttrain.data.ahead import in_order, processes
from fasttrain.data.bad_row import BadRow
from fasttrain.data.groups import GroupIndex, PairFiles, image_hash
from fasttrain.data.images import ImageRef, check_header
from fasttrain.data.pairs import Pair
from fasttrain.data.plain_rows import PlainPair, PlainRows
from fasttrain.data.token_bounds import TokenBounds
from fasttrain.files import HashMemo

QUESTIONS = 8  # about one image that run together at most: the image costs an eighth then, and a step holds others too
_CHUNK = 10_000  # rows that a process reads at a time
_SEVERAL = 2 * _CHUNK  # rows from which on processes are worth starting


class BadRowFound(NamedTuple):
    """A BadRow as it travels between processes."""

    row: int
    where: str
    reason: str


class Rows(NamedTuple):
    """Some rows of the files, those that can be used: one entry a row in each array."""

    row: np.ndarray  # uint32
    key: np.ndarray  # uint64 (rows, 2): equal for rows that may share a group
    paths: np.ndarray  # uint64: equal for equal image paths; 0 without images
    beginning: np.ndarray  # uint64: equal for equal beginnings up to the last image; 0 without images, or where prompts are grouped
    images: np.ndarray  # uint32: how many
    sequence: np.ndarray  # uint32: most tokens of the prompt with one answer; 0: not known
    answers: np.ndarray  # uint32: most tokens of all its answers


@dataclass
class RowTable:
    """What a process found in a piece of the files; `paths` are the image files in order of appearance."""

    rows: Rows
    bad: list[BadRowFound]
    paths: list[str]
    appended_end: int
    read: int


class RowReader:
    """Makes tables of rows; runs in any process."""

    def __init__(
        self, files: PairFiles, bounds: TokenBounds | None, headers: int | None = None, by_image: bool = False
    ) -> None:
        """At most `headers` image files are opened to see what they are, by each process; None: all."""
        self.files, self.bounds, self.headers, self.by_image = files, bounds, headers, by_image
        self._plain = PlainRows()
        self._opened: dict[ImageRef, bool] = {}

    def __call__(self, rows: range) -> RowTable:
        numbers, keys = array("I"), bytearray()
        paths, beginnings, images = array("Q"), array("Q"), array("I")
        sequences, answers = array("I"), array("I")
        bad: list[BadRowFound] = []
        names: dict[str, None] = {}
        appended = self.bounds.appended_end if self.bounds else 0
        for number, row, root in self.files.rows(rows):
            try:
                pair = self._pair(number, row, root)
            except BadRow as error:
                bad.append(BadRowFound(number, error.where, error.reason))
                continue
            bound = self.bounds.of(pair) if self.bounds and all(map(self._opens, pair.images)) else None
            numbers.append(number)
            keys += pair.key()
            paths.append(_paths_hash(pair, number) if pair.images else 0)
            beginnings.append(int.from_bytes(pair.beginning()[:8], "little") if self.by_image else 0)
            images.append(len(pair.images))
            sequences.append(bound.sequence if bound else 0)
            answers.append(bound.answers if bound else 0)
            for ref in pair.images:
                if ref.path is not None:
                    names[str(ref.path)] = None
        arrays = [np.frombuffer(part, np.uint32) for part in (numbers, images, sequences, answers)]
        held = Rows(
            arrays[0],
            np.frombuffer(bytes(keys), np.uint64).reshape(-1, 2),
            np.frombuffer(paths, np.uint64),
            np.frombuffer(beginnings, np.uint64),
            *arrays[1:],
        )
        return RowTable(
            held, bad, list(names), (self.bounds.appended_end if self.bounds else 0) - appended, len(rows)
        )

    def _opens(self, ref: ImageRef) -> bool:
        """Whether an image has a sound header, or is not to be looked at before it is needed."""
        if ref not in self._opened:
            if self.headers is not None and len(self._opened) >= self.headers:
                return True
            try:
                check_header(ref)
                sound = True
            except (OSError, ValueError):
                sound = False
            if ref.path is None:
                return sound
            self._opened[ref] = sound
        return self._opened[ref]

    def _pair(self, number: int, row: dict[str, Any] | BadRow, root: Path) -> PlainPair:
        if isinstance(row, BadRow):
            raise row
        plain = self._plain.read(row, root) if self.files.plain else None
        if plain is not None:
            return plain
        pair = self.files.read(row, number)
        try:
            return PlainPair.of(pair)
        except OSError as error:
            raise BadRow(
                pair.where, "images", "a readable image file", f"{error.filename} ({error.strerror})"
            ) from None


def read_rows(
    files: PairFiles, bounds: TokenBounds | None, headers: int | None = None, by_image: bool = False
) -> Generator[RowTable]:
    """Tables of all rows, in order; for large files made by other processes, which start at the call."""
    total = len(files)
    chunks = [range(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    workers = processes() if total >= _SEVERAL else 0
    ahead = -(-len(chunks) // workers) if workers else 0
    return in_order(RowReader(files, bounds, headers, by_image), chunks, workers, ahead)


def group_rows(
    files: PairFiles,
    memo: HashMemo,
    on_bad: Callable[[BadRow], None],
    tick: Callable[[int], object] = lambda n: None,
    seen: Callable[[list[str]], object] = lambda paths: None,
    tables: Iterable[RowTable] | None = None,
) -> GroupIndex:
    """Index every usable row by its group; rows that cannot be used go to `on_bad`, in order, image files to `seen`.

    `tables` are all rows', as `read_rows` makes them.
    """
    parts: list[Rows] = []
    appended_end = 0
    for table in read_rows(files, None) if tables is None else tables:
        for found in table.bad:
            on_bad(BadRow.told(found.where, found.reason))
        seen(table.paths)
        parts.append(table.rows)
        appended_end += table.appended_end
        tick(table.read)
    rows = Rows(*(np.concatenate(arrays) for arrays in zip(*parts)))
    parts.clear()
    group, unusable = _number_groups(files, rows, memo)
    if rows.beginning.any():
        group = _join_questions(group, rows.beginning)
    for found in unusable:
        on_bad(BadRow.told(found.where, found.reason))
    order = np.argsort(group, kind="stable")
    order = order[np.searchsorted(group[order], 0) :]  # without the unusable
    starts = np.searchsorted(group[order], np.arange(int(group.max(initial=-1)) + 2))
    return GroupIndex(
        rows.row[order].astype(np.int64),
        starts,
        rows.images[order],
        rows.sequence[order],
        rows.answers[order],
        appended_end,
    )


def _number_groups(files: PairFiles, table: Rows, memo: HashMemo) -> tuple[np.ndarray, list[BadRowFound]]:
    """int64 (rows,): the group of each row, numbered as they appear, -1 for rows whose images cannot be read."""
    rows = len(table.row)
    if not rows:
        return np.zeros(0, np.int64), []
    order = np.lexsort((table.key[:, 1], table.key[:, 0]))  # stable: rows of one key stay in order
    keys = table.key[order]
    fresh = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    first = np.empty(rows, np.int64)  # of each row, the place of the first row of its group
    first[order] = np.repeat(order[fresh], np.diff(np.r_[fresh, rows]))
    unusable = _part_by_content(files, table, memo, order, fresh, first)
    heads = np.zeros(rows, bool)
    heads[first[first >= 0]] = True
    group = np.where(first >= 0, (np.cumsum(heads) - 1)[first], -1)
    return group, unusable


def _join_questions(group: np.ndarray, beginning: np.ndarray) -> np.ndarray:
    """The groups of prompts put together where they begin alike, so many (`QUESTIONS`) at most, numbered as they appear."""
    joined = np.full(int(group.max(initial=-1)) + 1, -1, np.int64)
    open_groups: dict[
        int, tuple[int, int]
    ] = {}  # of a beginning: the joined group that takes more, and how many it has
    count = 0
    for prompt, own in zip(group.tolist(), beginning.tolist()):
        if prompt < 0 or joined[prompt] >= 0:
            continue
        number, held = open_groups.get(own, (-1, QUESTIONS)) if own else (-1, QUESTIONS)
        if held == QUESTIONS:
            number, held, count = count, 0, count + 1
        joined[prompt] = number
        open_groups[own] = number, held + 1
    return np.where(group >= 0, joined[group], -1)


def _part_by_content(
    files: PairFiles, table: Rows, memo: HashMemo, order: np.ndarray, fresh: np.ndarray, first: np.ndarray
) -> list[BadRowFound]:
    """Rows with equal prompts and image sizes but other image paths belong together only if the contents are equal."""
    paths = table.paths[order]
    ends = np.r_[fresh[1:], len(order)]
    other = np.flatnonzero(np.minimum.reduceat(paths, fresh) != np.maximum.reduceat(paths, fresh))
    unusable: list[BadRowFound] = []
    for run in other.tolist():
        members = order[fresh[run] : ends[run]]
        hashes: dict[int, bytes] = {}
        heads: dict[bytes, int] = {}
        for place in members.tolist():
            own, head = int(table.paths[place]), int(members[0])
            try:
                for needed, at in ((int(table.paths[head]), head), (own, place)):
                    if needed not in hashes:
                        hashes[needed] = _contents(files.pair(int(table.row[at])), memo)
            except BadRow as error:
                if own == int(table.paths[head]):
                    continue  # it needs no comparing
                unusable.append(BadRowFound(int(table.row[place]), error.where, error.reason))
                first[place] = -1
                continue
            first[place] = heads.setdefault(hashes[own], place)
    return sorted(unusable)


def _contents(pair: Pair, memo: HashMemo) -> bytes:
    try:
        text = " ".join(image_hash(ref, memo) for ref in pair.images)
    except OSError as error:
        raise BadRow(
            pair.where, "images", "a readable image file", f"{error.filename} ({error.strerror})"
        ) from None
    return blake2b(text.encode(), digest_size=16).digest()


def _paths_hash(pair: PlainPair, number: int) -> int:
    """Equal for equal paths; another one for every row with embedded images, whose contents are compared."""
    names = [str(number) if ref.path is None else f"/{ref.path}" for ref in pair.images]
    text = "\0".join(names).encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") | 1
