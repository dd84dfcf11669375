"""The rows of one group as token ids: prompt, distinct completions, pairs; what `data.overflow` cuts, drops or refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fasttrain.config import DataConfig
from fasttrain.data.bad_row import BadRow
from fasttrain.data.groups import PairFiles, Skipped
from fasttrain.data.images import image_size
from fasttrain.data.pairs import Pair, check_images
from fasttrain.data.tokens import ChatTokenizer, EncodedPrompt, common_start
from fasttrain.errors import UserError


class GroupTokens(NamedTuple):
    """Token ids (int32) of a prompt and its distinct completions, and (P, 2) chosen and rejected among them."""

    prompt: np.ndarray
    completions: list[np.ndarray]
    pairs: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


class Event(NamedTuple):
    """A row that is left out. `kind`: `bad` (data.on_bad_row decides), `dropped` (data.overflow did) or `stop` (ends it all)."""

    kind: str
    entry: Skipped


@dataclass
class Outcome:
    """What became of a group's rows; `tokens` is None if none of them can be used. `row` is the first that can."""

    tokens: GroupTokens | None
    row: int
    images: int
    truncated: int
    events: list[Event]
    appended_end: int
    split_boundary: int


def tokenize_group(
    files: PairFiles, rows: list[int], chat: ChatTokenizer, data: DataConfig, room: int | None = None
) -> Outcome:
    """Tokenize the rows of one group, at most `room` pairs of them."""
    candidate, first, images = None, 0, 0
    notes = chat.appended_end, chat.split_boundary
    events: list[Event] = []
    for row in rows:
        if candidate is not None and room is not None and len(candidate.pairs) >= room:
            break
        try:
            pair = files.pair(row)
            if candidate is None:
                check_images(pair)
                prompt = chat.prompt(pair.messages, pair.where, _sizes(pair, chat))
                fresh, first, images = _Candidate(prompt), row, len(pair.images)
                _check_prompt_fits(pair, prompt.fixed, data)
            else:
                fresh = candidate
            chosen, rejected = _fit(pair, prompt, chat, data)
        except BadRow as error:
            events.append(Event("bad", Skipped(error.where, None, error.reason)))
            continue
        except _Dropped as dropped:
            events.append(Event("dropped", Skipped(pair.where, pair.id, str(dropped))))
            continue
        except UserError as error:
            events.append(Event("stop", Skipped(pair.where, None, str(error))))
            break
        candidate = fresh
        candidate.add(chosen, rejected)
    notes = chat.appended_end - notes[0], chat.split_boundary - notes[1]
    if candidate is None:
        return Outcome(None, first, images, 0, events, *notes)
    return Outcome(candidate.tokens(), first, images, len(candidate.truncated), events, *notes)


class Tokenizing:
    """Tokenizes groups by the numbers of their rows; runs in any process."""

    def __init__(
        self, files: PairFiles, rows: Callable[[int], list[int]], chat: ChatTokenizer, data: DataConfig
    ) -> None:
        self.files, self.rows, self.chat, self.data = files, rows, chat, data

    def __call__(self, numbers: list[int]) -> list[Outcome]:
        return [self.one(number) for number in numbers]

    def one(self, number: int, room: int | None = None) -> Outcome:
        return tokenize_group(self.files, self.rows(number), self.chat, self.data, room)

    def all_certain(self, numbers: list[int]) -> list[tuple[GroupTokens, int]]:
        """`certain` of each, and how many of its answers do not tokenize together with their prompt."""
        return [self.certain(number) for number in numbers]

    def certain(self, number: int) -> tuple[GroupTokens, int]:
        """The tokens of a group that was proven usable; UserError if it is not so any more."""
        outcome = self.one(number)
        if outcome.events or outcome.tokens is None or outcome.truncated:
            entry = (
                outcome.events[0].entry
                if outcome.events
                else Skipped(self.files.where(outcome.row), None, "cut")
            )
            late = (
                ""
                if entry.reason.startswith("image")
                else " (the file has changed since its rows were first read)"
            )
            raise UserError(f"{entry.where}: {entry.reason}{late}")
        return outcome.tokens, outcome.split_boundary


@dataclass(frozen=True)
class _Fitted:
    """An answer that fits behind its prompt, perhaps because its end was cut off."""

    ids: np.ndarray
    cut: bool


@dataclass
class _Candidate:
    """A group while its rows are tokenized."""

    prompt: EncodedPrompt
    completions: dict[bytes, np.ndarray] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    truncated: set[bytes] = field(default_factory=set)

    def add(self, chosen: _Fitted, rejected: _Fitted) -> None:
        self.pairs.append((self._number(chosen), self._number(rejected)))

    def tokens(self) -> GroupTokens:
        """The prompt ends where the first of its answers leaves the generation prompt."""
        answers, fixed = list(self.completions.values()), self.prompt.fixed
        common = min(common_start(self.prompt.ids[fixed:], ids[:-1]) for ids in answers)
        completions = [ids[common:] for ids in answers]
        return GroupTokens(self.prompt.ids[: fixed + common], completions, np.array(self.pairs, np.int64))

    def _number(self, answer: _Fitted) -> int:
        key = answer.ids.tobytes()
        self.completions.setdefault(key, answer.ids)
        if answer.cut:
            self.truncated.add(key)
        return list(self.completions).index(key)


def _sizes(pair: Pair, chat: ChatTokenizer) -> list[tuple[int, int]] | None:
    if not chat.sizes_matter:
        return None
    try:
        return [image_size(ref) for ref in pair.images]
    except (ValueError, OSError) as error:
        raise BadRow(pair.where, "images", "an image", str(error)) from None


class _Dropped(Exception):
    """A pair that data.overflow leaves out."""


def _check_prompt_fits(pair: Pair, tokens: int, data: DataConfig) -> None:
    if tokens >= data.max_length:
        wanted, got = f"fewer than data.max_length = {data.max_length} tokens", f"{tokens}"
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
        total, room = prompt.fixed + len(ids), data.max_length - prompt.fixed
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
