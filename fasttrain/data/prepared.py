"""All groups of a data set by number: their pairs, images and tokens, with the account of what was left out.

Tokens are in one memory-mapped file, or, for groups of a large file that were proven usable without (`token_bounds`), made when
they are asked for.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fasttrain.data.ahead import in_order, processes
from fasttrain.data.group_tokens import GroupTokens, Tokenizing
from fasttrain.data.groups import PairFiles, Skipped
from fasttrain.data.images import ImageRef
from fasttrain.data.token_spool import TokenSpool

# What is kept of tokens that were made when asked for: this many, a group counting as some hundred more
_REMEMBERED_TOKENS = 1 << 24
_OF_A_GROUP = 300
CHUNK = 64  # groups that a process tokenizes at a time
MANY = 5000  # groups of which some will do to know what they are like
SEVERAL = 2000  # groups from which on processes are worth starting


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
    # ids that are no targets stand in completion_ids as ~id

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
    """Groups by number, from flat arrays: some by number, some by slot (`TokenSpool`).

    rows: the row that first held the prompt; images and counts (pairs) of a group; slots: -1 while it has no tokens, then
    `members` are its rows and `bounds` the most tokens of the group and of one of its sequences. `key` names the entry of the
    prepared cache that holds this data, None if none does; `image_state` is a hash over the sizes and times of its image
    files.
    """

    BY_NUMBER = ("rows", "images", "counts", "slots", "bounds", "member_starts")
    ARRAYS = (*TokenSpool.ARRAYS, *BY_NUMBER, "members")
    key: str | None = None
    image_state: str | None = None

    def __init__(
        self, files: PairFiles, account: Account, arrays: dict[str, np.ndarray], tokenizing: Callable[..., Tokenizing]
    ) -> None:  # fmt: skip
        """`tokenizing` makes what tokenizes groups, from a function that gives a group's rows.

        ValueError if the arrays do not belong together.
        """
        self.files, self.account = files, account
        self._tokens, self._lengths, self._pairs = (arrays[name] for name in ("tokens", "lengths", "pairs"))
        self._token_starts, self._length_starts = arrays["token_starts"], arrays["length_starts"]
        self._pair_starts = arrays["pair_starts"]
        self._rows, self._images, self._counts = (arrays[name] for name in ("rows", "images", "counts"))
        self._slots, self._bounds = arrays["slots"], arrays["bounds"]
        self._members, self._member_starts = arrays["members"], arrays["member_starts"]
        self._check()
        self._tokenizing = tokenizing(self.members)
        self._dropped: set[int] = set()
        self._made: OrderedDict[int, Group] = OrderedDict()
        self._made_tokens = 0
        self.lazy = bool(len(self._slots) and int(self._slots.min()) < 0)

    def _check(self) -> None:
        ends = (
            self._token_starts[-1],
            self._length_starts[-1],
            2 * self._pair_starts[-1],
            self._member_starts[-1],
        )
        slots = {len(starts) - 1 for starts in (self._token_starts, self._length_starts, self._pair_starts)}
        groups = {len(part) for part in (self._rows, self._images, self._counts, self._slots, self._bounds)}
        groups.add(len(self._member_starts) - 1)
        whole = (len(self._tokens), len(self._lengths), len(self._pairs), len(self._members))
        if len(slots) != 1 or len(groups) != 1 or ends != whole or self._slots.max(initial=-1) >= slots.pop():
            raise ValueError("arrays of different data")

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but files and account, as flat arrays."""
        return {name: np.asarray(getattr(self, f"_{name}")) for name in self.ARRAYS}

    def index_bytes(self) -> int:
        """What the index holds in memory: everything but token ids and the files themselves."""
        return sum(array.nbytes for name, array in self.arrays().items() if name != "tokens")

    def pair_counts(self) -> np.ndarray:
        """int64 (groups,): pairs of every group, 0 for a dropped one."""
        counts = self._counts.astype(np.int64)
        counts[list(self._dropped)] = 0
        return counts

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest group, and of the longest prompt with one completion; while `lazy`, more or as many."""
        group, sequence = (int(most) for most in self._bounds.max(axis=0, initial=0))
        group = max(group, int(np.diff(np.asarray(self._token_starts)).max(initial=0)))
        sequence = max(sequence, int(self._sequences().max(initial=0)))
        return group, sequence

    def _sequences(self) -> np.ndarray:
        """Tokens of each slot's prompt with its longest completion."""
        lengths, starts = np.asarray(self._lengths, np.int64), np.asarray(self._length_starts[:-1])
        if not len(lengths):
            return np.zeros(0, np.int64)
        answers = lengths.copy()
        answers[starts] = 0
        longest: np.ndarray = lengths[starts] + np.maximum.reduceat(answers, starts)
        return longest

    def some_groups(self, most: int = 200) -> list[int]:
        """Numbers of the groups with pairs; where there are many (`MANY`), of an even spread of `most` of them."""
        numbers = np.flatnonzero(self.pair_counts())
        if len(numbers) >= MANY:
            numbers = numbers[np.linspace(0, len(numbers) - 1, most).astype(np.int64)]
        return [int(number) for number in numbers]

    def longest_sequence(self) -> int:
        """Number of the group with pairs whose prompt with one completion is longest; while `lazy`, of one that may be."""
        most, sequences = self._bounds[:, 1].astype(np.int64), self._sequences()
        if len(sequences):
            slots = np.asarray(self._slots)
            most = np.where(slots < 0, most, sequences[np.maximum(slots, 0)])
        return int(np.where(self.pair_counts() > 0, most, -1).argmax())

    def longest_beyond(self, tokens: int) -> int:
        """Tokens of the longest group if they are more than `tokens`, else `tokens`; tokenizes groups that may be longer."""
        longest = max(tokens, int(np.diff(np.asarray(self._token_starts)).max(initial=0)))
        return self._longest_made(longest, 0, lambda group: group.tokens)

    def longest_sequence_beyond(self, tokens: int) -> int:
        """The same of the longest prompt with one completion."""
        longest = max(tokens, int(self._sequences().max(initial=0)))
        return self._longest_made(
            longest, 1, lambda group: len(group.prompt_ids) + max(map(len, group.completion_ids))
        )

    def _longest_made(self, longest: int, bound: int, count: Callable[[Group], int]) -> int:
        """The most tokens of a group that has none yet, if more than `longest`: from the one that may have most on."""
        most = np.where(self._slots < 0, self._bounds[:, bound], 0)
        for number in np.argsort(-most.astype(np.int64), kind="stable").tolist():
            if most[number] <= longest:
                break
            longest = max(longest, count(self.group(number)))
        return longest

    def completions(self) -> int:
        """Distinct completions of all groups that are not dropped; two for each pair of a group without tokens."""
        slots = np.asarray(self._slots)
        counts = self._counts.astype(np.int64) * 2
        known = slots >= 0
        counts[known] = (np.diff(np.asarray(self._length_starts)) - 1)[slots[known]]
        counts[list(self._dropped)] = 0
        return int(counts.sum())

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Group]:
        return (self.group(number) for number in range(len(self)))

    def is_lazy(self, number: int) -> bool:
        """Whether the group's tokens are made when they are asked for."""
        return bool(self._slots[number] < 0)

    def members(self, number: int) -> list[int]:
        """Rows of a group that has no tokens yet."""
        rows: list[int] = self._members[
            self._member_starts[number] : self._member_starts[number + 1]
        ].tolist()
        return rows

    def lengths(self, number: int) -> np.ndarray:
        """Prompt length, then completion lengths."""
        at = self._slots[number]
        if at < 0:
            group = self._make(number)
            return np.array([len(group.prompt_ids), *map(len, group.completion_ids)], np.int64)
        return np.array(self._lengths[self._length_starts[at] : self._length_starts[at + 1]], np.int64)

    def scored(self, number: int) -> np.ndarray:
        """How many tokens of each completion are targets."""
        if self._slots[number] < 0:
            completions = self._make(number).completion_ids
        else:
            _, *completions = self._ids(number)
        return np.array([np.count_nonzero(ids >= 0) for ids in completions], np.int64)

    def _ids(self, number: int) -> list[np.ndarray]:
        """The prompt's and the completions' ids of a group that has its tokens."""
        bounds = self._token_starts[self._slots[number]] + np.cumsum([0, *self.lengths(number)])
        return [np.asarray(self._tokens[a:b]) for a, b in itertools.pairwise(bounds)]

    def pair_count(self, number: int) -> int:
        return 0 if number in self._dropped else int(self._counts[number])

    def pairs(self, number: int) -> np.ndarray:
        """(P, 2) chosen and rejected, as indices into the group's completions; empty for a dropped group.

        An answer to learn, by itself, stands as both.
        """
        if number in self._dropped:
            return np.zeros((0, 2), np.int64)
        at = self._slots[number]
        if at < 0:
            return self._make(number).pairs
        flat = self._pairs[2 * self._pair_starts[at] : 2 * self._pair_starts[at + 1]]
        return np.array(flat, np.int64).reshape(-1, 2)

    def group(self, number: int) -> Group:
        at = self._slots[number]
        if at < 0:
            made = self._make(number)
            return (
                made
                if number not in self._dropped
                else Group(number, made.where, made.prompt_ids, made.completion_ids, self.pairs(number))
            )
        prompt, *completions = self._ids(number)
        return Group(number, self.where(number), prompt, completions, self.pairs(number))

    def _make(self, number: int) -> Group:
        """Tokenize a group, or remember it from a moment ago."""
        if number in self._made:
            self._made.move_to_end(number)
            return self._made[number]
        tokens, _ = self._tokenizing.certain(number)
        group = Group(number, self.where(number), *tokens)
        self.remember([group])
        return group

    def remember(self, groups: Iterable[Group]) -> None:
        """Keep groups that another process tokenized, until there are too many."""
        for group in groups:
            if group.number not in self._made:
                self._made[group.number] = group
                self._made_tokens += group.tokens + _OF_A_GROUP
        while self._made_tokens > _REMEMBERED_TOKENS and len(self._made) > 1:
            _, old = self._made.popitem(last=False)
            self._made_tokens -= old.tokens + _OF_A_GROUP

    def with_tokens(
        self, steps: Iterable[tuple[int, float, np.ndarray]], workers: int
    ) -> Iterator[tuple[int, float, np.ndarray]]:
        """The same (number, epoch, groups), their groups tokenized ahead by another process if there are any workers."""
        if not self.lazy or not workers:
            return iter(steps)
        return self._tokenized_ahead(steps)

    def _tokenized_ahead(
        self, steps: Iterable[tuple[int, float, np.ndarray]]
    ) -> Iterator[tuple[int, float, np.ndarray]]:
        def make(step: tuple[int, float, np.ndarray]) -> tuple[tuple[int, float, np.ndarray], list[Group]]:
            return step, [self.group(number) for number in step[2].tolist() if self.is_lazy(number)]

        for step, groups in in_order(make, steps, workers=1):
            self.remember(groups)
            yield step

    def complete(self, progress: Callable[[str, int], Callable[[int], object]] = lambda name, total: lambda n: None) -> int:  # fmt: skip
        """Tokenize all groups that have no tokens yet, in several processes; how many answers do not join their prompt."""
        if not self.lazy:
            return 0
        spool, slots, split = TokenSpool(), np.empty(len(self), np.int64), 0
        missing = np.flatnonzero(self._slots < 0)
        tick = progress("tokenizing", len(missing))
        chunks = [part.tolist() for part in np.array_split(missing, -(-len(missing) // CHUNK))]
        workers = processes() if len(missing) >= SEVERAL else 0
        try:
            fresh = in_order(self._tokenizing.all_certain, chunks, workers)
            made = (tokens for chunk in fresh for tokens in chunk)
            for number in range(len(self)):
                if self._slots[number] < 0:
                    tokens, alone = next(made)
                    split += alone
                    tick(1)
                else:
                    held = self.group(number)
                    tokens = GroupTokens(held.prompt_ids, held.completion_ids, self.pairs(number))
                slots[number] = spool.append(tokens)
            arrays = spool.seal()
        except BaseException:
            spool.discard()
            raise
        for name, values in arrays.items():
            setattr(self, f"_{name}", values)
        self._slots, self._members = slots, np.zeros(0, np.uint32)
        self._member_starts = np.zeros(len(self) + 1, np.int64)
        self._bounds = np.zeros((len(self), 2), np.uint32)
        self._made.clear()
        self._made_tokens, self.lazy = 0, False
        return split

    @property
    def dropped(self) -> bool:
        """Whether groups were left out after the files had been read."""
        return bool(self._dropped)

    def first_row(self, number: int) -> int:
        """Running number, over all files, of the row that first held this prompt."""
        return int(self._rows[number])

    def where(self, number: int) -> str:
        """File and line of the row that first held this prompt."""
        return self.files.where(self.first_row(number))

    def images(self, number: int) -> tuple[ImageRef, ...]:
        """The images of a group's prompt, read again from the row that first held it."""
        return self.files.pair(int(self._rows[number])).images if self._images[number] else ()

    def image_count(self, number: int) -> int:
        return int(self._images[number])

    @property
    def images_in_part(self) -> bool:
        """Whether some groups have images and some have none."""
        return bool(self._images.any() and not self._images.all())

    def drop(self, number: int, reason: str) -> None:
        """Leave a group out after all (its image turned out broken); its number stays, with no pairs."""
        pairs = self.pair_count(number)
        self.account.skipped.append(
            Skipped(self.where(number), None, f"{reason} ({pairs} pair(s) of its group)")
        )
        self.account.pairs -= pairs
        self.account.groups -= 1
        self.account.images -= self.image_count(number)
        self._dropped.add(number)

    def skipped_lines(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.account.skipped]
