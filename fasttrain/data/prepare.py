"""Pair files -> prepared data: rows are read and checked, grouped, and tokenized as far as that must be known at the start.

Below `LAZY_FROM` rows everything is tokenized. In larger files a group whose rows are all proven usable (`token_bounds`) gets
its tokens when a step asks for them; what is left out, and the pairs of every step, are exactly the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np

from fasttrain.config import DataConfig
from fasttrain.data import prepared_cache
from fasttrain.data.ahead import in_order, processes
from fasttrain.data.bad_row import BadRow
from fasttrain.data.group_tokens import Outcome, Tokenizing
from fasttrain.data.groups import GroupIndex, PairFiles, Skipped
from fasttrain.data.pairs import Pair, read_pair
from fasttrain.data.prepared import CHUNK, SEVERAL, Account, PreparedData
from fasttrain.data.row_index import group_rows, read_rows
from fasttrain.data.template_trace import Unknown
from fasttrain.data.token_bounds import TokenBounds
from fasttrain.data.token_spool import TokenSpool
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError
from fasttrain.files import HashMemo
from fasttrain.progress import say

HEADERS = 10_000  # image files of a large pair file that each process opens at the start
LAZY_FROM = 20_000  # rows; fewer are tokenized in seconds

Ticker = Callable[[str, int], Callable[[int], object]]


def prepare(
    paths: str | list[str],
    data: DataConfig,
    chat: ChatTokenizer,
    memo: HashMemo,
    *,
    seed: int,
    limit_pairs: int | None = None,
    progress: Ticker = lambda name, total: lambda n: None,
    read: Callable[..., Pair] = read_pair,
    whole: bool = False,
) -> PreparedData:
    """Read, group and tokenize pair files; UserError at the first bad row unless data.on_bad_row is skip.

    whole: give all groups their tokens now, however large the files are.
    """
    preparation = Preparation(
        paths, data, chat, memo, seed=seed, limit_pairs=limit_pairs, progress=progress, read=read, whole=whole
    )
    return preparation.finish()


def tokenize_all(prepared: PreparedData, chat: ChatTokenizer, progress: Ticker) -> None:
    """Give all groups their tokens, and keep them for the next start."""
    if prepared.lazy:
        before = chat.split_boundary
        chat.split_boundary = before + prepared.complete(progress)
        prepared_cache.replace(prepared, chat.split_boundary - before)


class Preparation:
    """Preparing files in two parts: other processes begin to read large ones when it is made, `finish` gives the data."""

    def __init__(
        self, paths: str | list[str], data: DataConfig, chat: ChatTokenizer, memo: HashMemo, *, seed: int,
        limit_pairs: int | None, progress: Ticker, read: Callable[..., Pair] = read_pair, whole: bool = False,
    ) -> None:  # fmt: skip
        self.paths, self.data, self.chat, self.memo, self.seed = paths, data, chat, memo, seed
        self.limit, self.progress, self.whole = limit_pairs, progress, whole
        names = [paths] if isinstance(paths, str) else paths
        self.files = PairFiles(names, data.image_root, read)
        self.large = len(self.files) >= LAZY_FROM
        self._names, self._read_by = (
            names,
            f"{getattr(read, '__module__', '')}.{getattr(read, '__qualname__', read)}",
        )
        self.key: str | None = None
        self._held: PreparedData | None = None
        if not self.large or prepared_cache.are_hashed(names, memo):
            self._look_up()
        if self._held is None:
            self._bounds = self._find_bounds() if self.large else None
            # with skip, which rows are left out must be known now; with stop, a broken image ends the run when it is met
            headers = HEADERS if data.on_bad_row == "stop" else None
            self._tables = read_rows(self.files, self._bounds, headers, data.group_by == "image")
        if self.key is None:  # hashed for the first time, while other processes read
            self._look_up()

    @property
    def in_background(self) -> bool:
        """Whether other processes are reading, so that `finish` had better come late."""
        return self.large and self._held is None

    def _look_up(self) -> None:
        """Find the prepared cache's entry of this data, if the files are large enough for one."""
        if len(self.files) < prepared_cache.SMALLEST:
            return
        limit, how = self.limit, self._read_by
        self.key = prepared_cache.entry_key(
            self._names, self.files.roots, self.data, self.chat, self.memo,
            limit=limit, seed=limit and self.seed, read=how,
        )  # fmt: skip
        if self.key is not None:
            self._held = prepared_cache.load(self.key, self.files, self.chat, self._tokenizing)

    def _find_bounds(self) -> TokenBounds | None:
        try:
            if self.data.group_by == "image":
                raise Unknown(
                    "data.group_by is image: what questions about one begin with is known from their tokens"
                )
            return TokenBounds(self.chat, self.data.max_length)
        except Unknown as reason:
            say(f"note: all {len(self.files):,} rows are tokenized before the first step: {reason}")
        return None

    def _tokenizing(self, rows: Callable[[int], list[int]]) -> Tokenizing:
        return Tokenizing(self.files, rows, self.chat, self.data)

    def finish(self) -> PreparedData:
        """The data, once all rows have been read."""
        prepared = self._held or self._fresh()
        if self.whole:
            tokenize_all(prepared, self.chat, self.progress)
        return prepared

    def _fresh(self) -> PreparedData:
        with (
            contextlib.closing(prepared_cache.ImageWitness()) as witness,
            prepared_cache.counted(self.chat) as notes,
        ):
            prepared = self._read(witness.see)
            if not prepared.account.pairs:
                reasons = {entry.reason for entry in prepared.account.skipped}
                why = f" ({min(reasons)})" if reasons else ""
                raise UserError(f"{self.paths}: wanted at least one usable pair, got none{why}")
            if self.key is not None:
                prepared_cache.store(self.key, prepared, witness, notes())
        return prepared

    def _read(self, seen: Callable[[list[str]], object]) -> PreparedData:
        account = Account(rows=len(self.files))
        for source in self.files.sources:
            account.skipped += [Skipped(where, None, reason) for where, reason in source.passed_over]

        def on_bad(error: BadRow) -> None:
            if self.data.on_bad_row == "stop":
                raise error
            account.skipped.append(Skipped(error.where, None, error.reason))

        for source in self.files.sources:
            for error in source.bad:
                on_bad(error)
        tick = self.progress("reading pairs", len(self.files))
        index = group_rows(self.files, self.memo, on_bad, tick, seen, self._tables)
        return _Assembly(self, index, account, on_bad).data()


class _Assembly:
    """Groups on their way into prepared data: those to keep, with tokens where these are needed."""

    def __init__(
        self, preparation: Preparation, index: GroupIndex, account: Account, on_bad: Callable[[BadRow], None]
    ) -> None:
        self.preparation, self.index, self.account, self.on_bad = preparation, index, account, on_bad
        self.spool = TokenSpool()
        self.kept: dict[str, list[int]] = {name: [] for name in ("number", "row", "images", "count", "slot")}
        self.tokenizing = preparation._tokenizing(lambda number: index.group(number).tolist())

    def data(self) -> PreparedData:
        index, limit = self.index, self.preparation.limit
        known = (
            np.minimum.reduceat(index.sequence, index.starts[:-1]) > 0 if len(index) else np.zeros(0, bool)
        )
        try:
            if limit:
                room = self._take_limited(known, limit)
            else:
                self._tokenize(np.flatnonzero(~known).tolist())
                room = {}
            arrays = self._arrays(known, room)
        except BaseException:
            self.spool.discard()
            raise
        self.account.groups, self.account.pairs = len(arrays["rows"]), int(arrays["counts"].sum())
        self.account.images = int(arrays["images"].sum())
        return PreparedData(self.preparation.files, self.account, arrays, self.preparation._tokenizing)

    def _take_limited(self, known: np.ndarray, limit: int) -> dict[int, int]:
        """Shuffled groups until there are enough pairs; how many each group without tokens gives."""
        taken, rooms = 0, {}
        tick = self.preparation.progress("tokenizing", len(self.index))
        for number in np.random.default_rng([self.preparation.seed, 7]).permutation(len(self.index)).tolist():
            tick(1)
            if known[number]:
                rooms[number] = min(len(self.index.group(number)), limit - taken)
                taken += rooms[number]
            else:
                taken += self._keep(number, self.tokenizing.one(number, limit - taken))
            if taken >= limit:
                break
        return rooms

    def _tokenize(self, numbers: list[int]) -> None:
        """All of these groups, in several processes if they are many."""
        tick = self.preparation.progress("tokenizing", len(numbers))
        chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
        workers = processes() if len(numbers) >= SEVERAL else 0
        with contextlib.closing(in_order(self.tokenizing, chunks, workers)) as outcomes:
            for chunk, found in zip(chunks, outcomes):
                for number, outcome in zip(chunk, found):
                    tick(1)
                    self._keep(number, outcome, elsewhere=workers > 0)

    def _keep(self, number: int, outcome: Outcome, elsewhere: bool = False) -> int:
        """Note what happened to a group's rows; how many pairs it gave."""
        chat = self.preparation.chat
        if elsewhere:
            chat.appended_end += outcome.appended_end
            chat.split_boundary += outcome.split_boundary
        for kind, entry in outcome.events:
            if kind == "stop":
                raise UserError(entry.reason)
            if kind == "bad":
                self.on_bad(BadRow.told(entry.where, entry.reason))
            else:
                self.account.skipped.append(entry)
        if outcome.tokens is None:
            return 0
        pairs = len(outcome.tokens.pairs)
        self.account.truncated += outcome.truncated
        fields = (number, outcome.row, outcome.images, pairs, self.spool.append(outcome.tokens))
        for name, value in zip(self.kept, fields):
            self.kept[name].append(value)
        return pairs

    def _arrays(self, known: np.ndarray, rooms: dict[int, int]) -> dict[str, np.ndarray]:
        """Groups in order of first appearance: the tokenized ones and, of the known ones, all or those with room."""
        index = self.index
        lazy = np.array(sorted(rooms), np.int64) if self.preparation.limit else np.flatnonzero(known)
        counts = np.diff(index.starts)[lazy]
        if self.preparation.limit:
            counts = np.array([rooms[number] for number in lazy.tolist()], np.int64)
        members, bounds = _members(index, lazy, counts)
        if index.appended_end:  # the same number for every row
            answers = index.appended_end // int(np.count_nonzero(index.sequence))
            self.preparation.chat.appended_end += answers * int(counts.sum())
        number = np.r_[np.array(self.kept["number"], np.int64), lazy]
        order = np.argsort(number, kind="stable")
        heads = index.starts[lazy]
        tokenized = len(number) - len(lazy)
        held = np.zeros(tokenized, np.int64)
        member_counts = np.r_[held, counts][order]
        return self.spool.seal() | {
            "rows": np.r_[np.array(self.kept["row"], np.int64), index.rows[heads]][order].astype(np.uint32),
            "images": np.r_[np.array(self.kept["images"], np.int64), index.images[heads]][order].astype(
                np.uint32
            ),
            "counts": np.r_[np.array(self.kept["count"], np.int64), counts][order].astype(np.uint32),
            "slots": np.r_[np.array(self.kept["slot"], np.int64), np.full(len(lazy), -1)][order],
            "bounds": np.r_[np.zeros((tokenized, 2), np.uint32), bounds][order],
            "member_starts": np.r_[0, np.cumsum(member_counts)].astype(np.int64),
            "members": members,
        }


def _members(index: GroupIndex, groups: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first `counts` rows of each of the groups in a row, uint32; most tokens of each group and of its sequences."""
    if not len(groups):
        return np.zeros(0, np.uint32), np.zeros((0, 2), np.uint32)
    ends = np.cumsum(counts)
    places = np.arange(int(ends[-1])) + np.repeat(index.starts[groups] - (ends - counts), counts)
    begins = ends - counts
    sequence = np.maximum.reduceat(index.sequence[places].astype(np.int64), begins)
    group = sequence + np.add.reduceat(index.answers[places].astype(np.int64), begins)
    return index.rows[places].astype(np.uint32), np.stack([group, sequence], 1).astype(np.uint32)
