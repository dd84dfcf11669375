"""All groups of a data set as token ids in one memory-mapped file, with the account of what was left out."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fasttrain.config import DataConfig
from fasttrain.data.groups import GroupIndex, PairFiles, Skipped, group_rows
from fasttrain.data.images import ImageRef, image_size
from fasttrain.data.pairs import Pair, check_images, read_pair
from fasttrain.data.sources import BadRow
from fasttrain.data.tokens import ChatTokenizer, EncodedPrompt
from fasttrain.errors import UserError
from fasttrain.files import HashMemo, cache_root


@dataclass(frozen=True)
class Group:
    """One prompt with its distinct completions and the pairs among them."""

    number: int
    where: str
    prompt_ids: np.ndarray
    completion_ids: list[np.ndarray]
    pairs: (
        np.ndarray
    )  # (P, 2) int: chosen, rejected as indices into completion_ids; equal for an answer to learn

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))


@dataclass
class Account:
    """What happened to the rows of a data set."""

    rows: int = 0
    pairs: int = 0
    groups: int = 0
    images: int = 0
    truncated: int = 0
    skipped: list[Skipped] = field(default_factory=list)


class PreparedData:
    """Groups by number. Token ids are int32 in a mapped file; the index is a few flat arrays.

    `key` names the entry of the prepared cache that holds this data, None if none does.
    """

    ARRAYS = (
        "tokens",
        "lengths",
        "pairs",
        "token_starts",
        "length_starts",
        "pair_starts",
        "rows",
        "images",
        "order",
    )
    key: str | None = None

    def __init__(self, files: PairFiles, account: Account) -> None:
        self.files, self.account = files, account
        folder = cache_root() / "spool"
        folder.mkdir(parents=True, exist_ok=True)
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by seal)
        self._tokens: np.ndarray = np.zeros(0, np.int32)
        self._lengths, self._pairs = array("i"), array("i")
        self._token_starts, self._length_starts, self._pair_starts = (
            array("q", [0]),
            array("q", [0]),
            array("q", [0]),
        )
        self._rows, self._images = array("q"), array("i")
        self._order: np.ndarray = np.zeros(0, np.int64)
        self._dropped: set[int] = set()

    def append(
        self, prompt: np.ndarray, completions: list[np.ndarray], pairs: np.ndarray, row: int, images: int
    ) -> None:
        for ids in (prompt, *completions):
            self._spool.write(ids.astype(np.int32).tobytes())
            self._lengths.append(len(ids))
        self._token_starts.append(self._token_starts[-1] + len(prompt) + sum(map(len, completions)))
        self._length_starts.append(len(self._lengths))
        self._pairs.extend(pairs.ravel().tolist())
        self._pair_starts.append(len(self._pairs) // 2)
        self._rows.append(row)
        self._images.append(images)

    def seal(self, order: np.ndarray | None = None) -> None:
        """Map the written tokens; `order` puts groups back into file order."""
        self._spool.flush()
        self._tokens = np.memmap(self._spool, np.int32, "r") if self._lengths else np.zeros(0, np.int32)
        self._spool.close()  # the mapping keeps the unlinked file
        self._order = np.arange(len(self._rows)) if order is None else order
        self.account.groups = len(self._rows)
        self.account.pairs = int(self._pair_starts[-1])
        self.account.images = sum(self._images)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but files and account, as flat arrays."""
        return {name: np.asarray(getattr(self, f"_{name}")) for name in self.ARRAYS}

    @classmethod
    def from_arrays(cls, files: PairFiles, account: Account, arrays: dict[str, np.ndarray]) -> PreparedData:
        """Data as `arrays` gave it, perhaps mapped from files; ValueError if the arrays do not belong together."""
        data = cls(files, account)
        data.discard()
        for name in cls.ARRAYS:
            setattr(data, f"_{name}", arrays[name])
        groups = len(data._rows)
        ends = (data._token_starts[-1], data._length_starts[-1], 2 * data._pair_starts[-1])
        starts = {len(arrays[name]) for name in ("token_starts", "length_starts", "pair_starts")}
        if starts != {groups + 1} or ends != (len(data._tokens), len(data._lengths), len(data._pairs)):
            raise ValueError("arrays of different data")
        return data

    def pair_counts(self) -> np.ndarray:
        """int64 (groups,): pairs of every group, 0 for a dropped one."""
        counts = np.diff(np.asarray(self._pair_starts))[self._order]
        counts[list(self._dropped)] = 0
        return counts

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest group, and of the longest prompt with one completion."""
        lengths, starts = np.asarray(self._lengths, np.int64), np.asarray(self._length_starts)
        answers = lengths.copy()
        answers[starts[:-1]] = 0
        sequences = lengths[starts[:-1]] + np.maximum.reduceat(answers, starts[:-1])
        return int(np.diff(np.asarray(self._token_starts)).max()), int(sequences.max())

    def completions(self) -> int:
        """Distinct completions of all groups that are not dropped."""
        counts = np.diff(np.asarray(self._length_starts))[self._order] - 1
        counts[list(self._dropped)] = 0
        return int(counts.sum())

    def discard(self) -> None:
        """Close the temporary file of data that is not sealed after all."""
        self._spool.close()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Group]:
        return (self.group(number) for number in range(len(self)))

    def lengths(self, number: int) -> np.ndarray:
        """Prompt length, then completion lengths."""
        at = self._order[number]
        return np.array(self._lengths[self._length_starts[at] : self._length_starts[at + 1]], np.int64)

    def pair_count(self, number: int) -> int:
        at = self._order[number]
        return 0 if number in self._dropped else int(self._pair_starts[at + 1] - self._pair_starts[at])

    def pairs(self, number: int) -> np.ndarray:
        """(P, 2) chosen and rejected, as indices into the group's completions; empty for a dropped group.

        An answer to learn, by itself, stands as both.
        """
        if number in self._dropped:
            return np.zeros((0, 2), np.int64)
        at = self._order[number]
        flat = self._pairs[2 * self._pair_starts[at] : 2 * self._pair_starts[at + 1]]
        return np.array(flat, np.int64).reshape(-1, 2)

    def group(self, number: int) -> Group:
        at = self._order[number]
        bounds = self._token_starts[at] + np.cumsum([0, *self.lengths(number)])
        prompt, *completions = [np.asarray(self._tokens[a:b]) for a, b in itertools.pairwise(bounds)]
        return Group(number, self.where(number), prompt, completions, self.pairs(number))

    def first_row(self, number: int) -> int:
        """Running number, over all files, of the row that first held this prompt."""
        return int(self._rows[self._order[number]])

    def where(self, number: int) -> str:
        """File and line of the row that first held this prompt."""
        return self.files.where(self.first_row(number))

    def images(self, number: int) -> tuple[ImageRef, ...]:
        """The images of a group's prompt, read again from the row that first held it."""
        at = self._order[number]
        return self.files.pair(int(self._rows[at])).images if self._images[at] else ()

    def image_count(self, number: int) -> int:
        return int(self._images[self._order[number]])

    def drop(self, number: int, reason: str) -> None:
        """Leave a group out after all (its image turned out broken); its number stays, with no pairs."""
        pairs = self.pair_count(number)
        self.account.skipped.append(
            Skipped(self.where(number), None, f"{reason} ({pairs} pair(s) of this prompt)")
        )
        self.account.pairs -= pairs
        self.account.groups -= 1
        self.account.images -= self.image_count(number)
        self._dropped.add(number)

    def skipped_lines(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.account.skipped]


@dataclass(frozen=True)
class _Fitted:
    """An answer that fits behind its prompt, perhaps because its end was cut off."""

    ids: np.ndarray
    cut: bool


@dataclass
class _Candidate:
    """A group while its rows are tokenized."""

    prompt: np.ndarray
    completions: dict[bytes, np.ndarray] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    truncated: set[bytes] = field(default_factory=set)

    def add(self, chosen: _Fitted, rejected: _Fitted) -> None:
        self.pairs.append((self._number(chosen), self._number(rejected)))

    def _number(self, answer: _Fitted) -> int:
        key = answer.ids.tobytes()
        self.completions.setdefault(key, answer.ids)
        if answer.cut:
            self.truncated.add(key)
        return list(self.completions).index(key)


def prepare(
    paths: str | list[str],
    data: DataConfig,
    chat: ChatTokenizer,
    memo: HashMemo,
    *,
    seed: int,
    limit_pairs: int | None = None,
    progress: Callable[[str, int], Callable[[int], object]] = lambda name, total: lambda n: None,
    read: Callable[..., Pair] = read_pair,
) -> PreparedData:
    """Read, group and tokenize pair files; UserError at the first bad row unless data.on_bad_row is skip."""
    from fasttrain.data import prepared_cache

    names = [paths] if isinstance(paths, str) else paths
    files = PairFiles(names, data.image_root, read)
    key = None
    if len(files) >= prepared_cache.SMALLEST:
        how = f"{getattr(read, '__module__', '')}.{getattr(read, '__qualname__', read)}"
        key = prepared_cache.entry_key(
            names, data, chat, memo, limit=limit_pairs, seed=limit_pairs and seed, read=how
        )
    if key is not None and (held := prepared_cache.load(key, files, chat)) is not None:
        return held
    with contextlib.closing(prepared_cache.ImageWitness()) as witness, prepared_cache.counted(chat) as notes:
        prepared = _read(files, chat, data, memo, witness.see, seed, limit_pairs, progress)
        if not prepared.account.pairs:
            reasons = {entry.reason for entry in prepared.account.skipped}
            why = f" ({min(reasons)})" if reasons else ""
            raise UserError(f"{paths}: wanted at least one usable pair, got none{why}")
        if key is not None:
            prepared_cache.store(key, prepared, witness, notes())
    return prepared


def _read(
    files: PairFiles, chat: ChatTokenizer, data: DataConfig, memo: HashMemo, seen: Callable[[Pair], object], seed: int,
    limit_pairs: int | None, progress: Callable[[str, int], Callable[[int], object]],
) -> PreparedData:  # fmt: skip
    account = Account(rows=len(files))
    for source in files.sources:
        account.skipped += [Skipped(where, None, reason) for where, reason in source.passed_over]

    def on_bad(error: BadRow) -> None:
        if data.on_bad_row == "stop":
            raise error
        account.skipped.append(Skipped(error.where, None, error.reason))

    index = group_rows(files, memo, on_bad, progress("reading pairs", len(files)), seen)
    prepared = PreparedData(files, account)
    try:
        order = _tokenize(prepared, index, chat, data, on_bad, seed, limit_pairs, progress)
        prepared.seal(order)
    except BaseException:
        prepared.discard()
        raise
    return prepared


def _tokenize(
    prepared: PreparedData, index: GroupIndex, chat: ChatTokenizer, data: DataConfig,
    on_bad: Callable[[BadRow], None], seed: int, limit_pairs: int | None,
    progress: Callable[[str, int], Callable[[int], object]],
) -> np.ndarray | None:  # fmt: skip
    """Append all groups, or shuffled ones until there are enough pairs; then the order that puts them back."""
    groups = np.random.default_rng([seed, 7]).permutation(len(index)) if limit_pairs else range(len(index))
    kept, taken = [], 0
    tick = progress("tokenizing", len(groups))
    for number in groups:
        tick(1)
        room = limit_pairs - taken if limit_pairs else None
        group = _tokenize_group(
            prepared.files, index, int(number), chat, data, prepared.account, on_bad, room
        )
        if group is None:
            continue
        candidate, row, images = group
        pairs = np.array(candidate.pairs)
        prepared.append(candidate.prompt, list(candidate.completions.values()), pairs, row, images)
        prepared.account.truncated += len(candidate.truncated)
        kept.append(int(number))
        taken += len(pairs)
        if limit_pairs and taken >= limit_pairs:
            break
    return np.argsort(kept) if limit_pairs else None


def _tokenize_group(
    files: PairFiles, index: GroupIndex, number: int, chat: ChatTokenizer, data: DataConfig, account: Account,
    on_bad: Callable[[BadRow], None], room: int | None,
) -> tuple[_Candidate, int, int] | None:  # fmt: skip
    candidate, first, images = None, 0, 0
    for row in index.group(number).tolist():
        if candidate is not None and room is not None and len(candidate.pairs) >= room:
            break
        pair = files.pair(row)
        try:
            if candidate is None:
                check_images(pair)
                prompt = chat.prompt(pair.messages, pair.where, _sizes(pair, chat))
                fresh, first, images = _Candidate(prompt.ids), row, len(pair.images)
                _check_prompt_fits(pair, fresh.prompt, data)
            else:
                fresh = candidate
            chosen, rejected = _fit(pair, prompt, chat, data)
        except BadRow as error:
            on_bad(error)
            continue
        except _Dropped as dropped:
            account.skipped.append(Skipped(pair.where, pair.id, str(dropped)))
            continue
        candidate = fresh
        candidate.add(chosen, rejected)
    return (candidate, first, images) if candidate is not None else None


def _sizes(pair: Pair, chat: ChatTokenizer) -> list[tuple[int, int]] | None:
    if not chat.sizes_matter:
        return None
    try:
        return [image_size(ref) for ref in pair.images]
    except (ValueError, OSError) as error:
        raise BadRow(pair.where, "images", "an image", str(error)) from None


class _Dropped(Exception):
    """A pair that data.overflow leaves out."""


def _check_prompt_fits(pair: Pair, prompt: np.ndarray, data: DataConfig) -> None:
    if len(prompt) >= data.max_length:
        wanted, got = f"fewer than data.max_length = {data.max_length} tokens", f"{len(prompt)}"
        if data.overflow == "drop":
            raise _Dropped(f"prompt: wanted {wanted}, got {got}")
        if data.overflow == "truncate":  # only ever shortens completions
            raise BadRow(pair.where, "prompt", wanted, got)
        raise UserError(
            f"{pair.where}: prompt: wanted {wanted}, got {got}; raise it, or set data.overflow to drop"
        )


def _fit(pair: Pair, prompt: EncodedPrompt, chat: ChatTokenizer, data: DataConfig) -> tuple[_Fitted, _Fitted]:
    """Token ids of chosen and rejected, cut, refused or dropped as data.overflow says."""
    result: list[_Fitted] = []
    answers = [("chosen", pair.chosen), ("rejected", pair.rejected)]
    for name, answer in answers:
        if answer is None:  # nothing to compare with
            return result[0], result[0]
        ids = chat.completion(pair.messages, prompt, answer, pair.where, name)
        total, room = len(prompt.ids) + len(ids), data.max_length - len(prompt.ids)
        if total > data.max_length:
            if data.overflow == "error":
                raise UserError(
                    f"{pair.where}: {name}: wanted at most data.max_length = {data.max_length} tokens with its prompt, "
                    f"got {total}; raise it, or set data.overflow to truncate or drop"
                )
            if data.overflow == "drop":
                raise _Dropped(
                    f"{name}: {total} tokens with its prompt, data.max_length is {data.max_length}"
                )
        result.append(_Fitted(ids[:room], cut=len(ids) > room))
    chosen, rejected = result
    if np.array_equal(chosen.ids, rejected.ids):
        if chosen.cut or rejected.cut:
            raise _Dropped("rejected: the same as chosen after truncation")
        raise BadRow(
            pair.where, "rejected", "an answer that differs from chosen", "the same answer as tokens"
        )
    return chosen, rejected
