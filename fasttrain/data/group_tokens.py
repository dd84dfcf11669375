"""The rows of one group as token ids: prompt, distinct completions, pairs; what `data.overflow` cuts, drops or refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fasttrain.config import DataConfig
from fasttrain.data.answer_tokens import Dropped, Fitted, check_prompt_fits, fit_conversation, fit_pair, plain
from fasttrain.data.bad_row import BadRow
from fasttrain.data.groups import PairFiles, Skipped
from fasttrain.data.images import image_size
from fasttrain.data.pairs import Pair, check_images
from fasttrain.data.tokens import ChatTokenizer, EncodedPrompt, common_start
from fasttrain.errors import UserError


class GroupTokens(NamedTuple):
    """Token ids (int32) of a prompt and its distinct completions, and (P, 2) chosen and rejected among them.

    What is no target in a completion, as others say it in a conversation, stands as ~id.
    """

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
                sizes = _sizes(pair, chat)
                prompt = chat.prompt(pair.messages, pair.where, sizes)
                fresh, first, images = _Candidate(prompt), row, len(pair.images)
                check_prompt_fits(pair, prompt.fixed, data)
            else:
                fresh = candidate
            if pair.later:
                answers, left_out = fit_conversation(pair, prompt, chat, data, sizes)
                fitted = [(one, one) for one in answers]
            else:
                fitted, left_out = [fit_pair(pair, prompt, chat, data)], None
        except BadRow as error:
            events.append(Event("bad", Skipped(error.where, None, error.reason)))
            continue
        except Dropped as dropped:
            events.append(Event("dropped", Skipped(pair.where, pair.id, str(dropped))))
            continue
        except UserError as error:
            events.append(Event("stop", Skipped(pair.where, None, str(error))))
            break
        candidate = fresh
        for chosen, rejected in fitted if room is None else fitted[: room - len(candidate.pairs)]:
            candidate.add(chosen, rejected)
        if left_out:
            events.append(Event("dropped", Skipped(pair.where, pair.id, left_out)))
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


@dataclass
class _Candidate:
    """A group while its rows are tokenized."""

    prompt: EncodedPrompt
    completions: dict[bytes, Fitted] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    truncated: set[bytes] = field(default_factory=set)

    def add(self, chosen: Fitted, rejected: Fitted) -> None:
        self.pairs.append((self._number(chosen), self._number(rejected)))

    def tokens(self) -> GroupTokens:
        """The prompt ends where the first of its answers leaves it, or the generation prompt."""
        ids, start = self.prompt.ids, min(answer.behind for answer in self.completions.values())
        answers = [np.concatenate([~ids[start : one.behind], one.ids]) for one in self.completions.values()]
        common = min(common_start(ids[start:], plain(answer)[:-1]) for answer in answers)
        completions = [answer[common:] for answer in answers]
        return GroupTokens(ids[: start + common], completions, np.array(self.pairs, np.int64))

    def _number(self, answer: Fitted) -> int:
        key = answer.ids.tobytes() + answer.behind.to_bytes(8, "little")
        self.completions.setdefault(key, answer)
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
