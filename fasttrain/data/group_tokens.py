"""The rows of one group as token ids: prompt, distinct completions, pairs; what `data.overflow` cuts, drops or refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fasttrain.config import DataConfig
from fasttrain.data.answer_tokens import (
    Dropped,
    Fitted,
    alike,
    check_beginning,
    check_prompt_fits,
    fit_conversation,
    fit_pair,
    plain,
)
from fasttrain.data.bad_row import BadRow
from fasttrain.data.groups import PairFiles, Skipped
from fasttrain.data.images import image_size
from fasttrain.data.pairs import Message, Pair, check_images
from fasttrain.data.tokens import ChatTokenizer, EncodedPrompt
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
                fresh, first, images = _Candidate(), row, len(pair.images)
            else:
                fresh = candidate
            prompt = fresh.prompt(pair, chat, sizes)
            check_prompt_fits(pair, prompt.fixed, data)
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
            candidate.add(prompt, chosen, rejected)
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
    """A group while its rows are tokenized: one prompt, or several that begin alike up to their images."""

    prompts: dict[tuple[Message, ...], EncodedPrompt] = field(default_factory=dict)
    answers: dict[bytes, tuple[EncodedPrompt, Fitted]] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    truncated: set[bytes] = field(default_factory=set)

    def prompt(self, pair: Pair, chat: ChatTokenizer, sizes: list[tuple[int, int]] | None) -> EncodedPrompt:
        """A row's own prompt."""
        if pair.messages not in self.prompts:
            made = chat.prompt(pair.messages, pair.where, sizes)
            for first in itertools.islice(self.prompts.values(), 1):
                check_beginning(first, made.ids[: made.fixed], pair, chat)
            self.prompts[pair.messages] = made
        return self.prompts[pair.messages]

    def add(self, prompt: EncodedPrompt, chosen: Fitted, rejected: Fitted) -> None:
        self.pairs.append((self._number(prompt, chosen), self._number(prompt, rejected)))

    def tokens(self) -> GroupTokens:
        """A prompt ends where the first of its answers leaves it, the group's where the first of its prompts does."""
        ends: dict[int, int] = {}
        for prompt, answer in self.answers.values():
            more = alike(prompt.ids[prompt.fixed :], plain(answer.ids)[:-1])
            more = more if answer.behind == prompt.fixed else 0
            ends[id(prompt)] = min(more, ends.get(id(prompt), more))
        sequences = []
        for prompt, answer in self.answers.values():
            end = ends[id(prompt)]
            given = np.concatenate([prompt.ids[: answer.behind], plain(answer.ids[:end])])
            sequences.append(np.concatenate([~given, answer.ids[end:]]))
        counts = [int(np.argmax(ids >= 0)) for ids in sequences]
        first = ~sequences[0][: counts[0]]
        shared = min(min(alike(first, plain(ids)), count) for ids, count in zip(sequences, counts))
        return GroupTokens(
            first[:shared], [ids[shared:] for ids in sequences], np.array(self.pairs, np.int64)
        )

    def _number(self, prompt: EncodedPrompt, answer: Fitted) -> int:
        place = next(n for n, known in enumerate(self.prompts.values()) if known is prompt)
        key = answer.ids.tobytes() + place.to_bytes(8, "little") + answer.behind.to_bytes(8, "little")
        self.answers.setdefault(key, (prompt, answer))
        if answer.cut:
            self.truncated.add(key)
        return list(self.answers).index(key)


def _sizes(pair: Pair, chat: ChatTokenizer) -> list[tuple[int, int]] | None:
    if not chat.sizes_matter:
        return None
    try:
        return [image_size(ref) for ref in pair.images]
    except (ValueError, OSError) as error:
        raise BadRow(pair.where, "images", "an image", str(error)) from None
