"""The answers of one row as token ids behind its prompt; what `data.overflow` cuts, drops or refuses.

Of a conversation that is learned, what others say stands between the answers: those ids are kept as ~id, and are no targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fasttrain.config import DataConfig
from fasttrain.data.bad_row import BadRow
from fasttrain.data.pairs import Pair
from fasttrain.data.tokens import ChatTokenizer, EncodedPrompt
from fasttrain.errors import UserError


def plain(ids: np.ndarray) -> np.ndarray:
    """Token ids, whether they are targets or not."""
    return np.where(ids < 0, ~ids, ids)


@dataclass(frozen=True)
class Fitted:
    """What follows the first `behind` ids of its prompt, and fits, perhaps because its end was cut off."""

    ids: np.ndarray
    behind: int
    cut: bool


class Dropped(Exception):
    """A row that data.overflow leaves out."""


def alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids two sequences begin with alike."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(np.argmax(differs)) if differs.any() else length


def check_beginning(first: EncodedPrompt, own: np.ndarray, pair: Pair, chat: ChatTokenizer) -> int:
    """How many of a prompt's ids a sequence begins with; BadRow where it has images behind them."""
    shared = alike(first.ids[: first.fixed], plain(own))
    if chat.image_token_id is not None and (plain(own[shared:]) == chat.image_token_id).any():
        changes = "with a chat template that changes what stands before an image when more is said"
        if pair.later:
            raise BadRow(pair.where, "turns", f"one answer a row {changes}", f"{1 + len(pair.later)} answers")
        raise BadRow(pair.where, "images", f"data.group_by prompt {changes}", "image")
    return shared


def check_prompt_fits(pair: Pair, tokens: int, data: DataConfig) -> None:
    """Dropped, BadRow or UserError, as data.overflow says, for a prompt that leaves no room for an answer."""
    if tokens >= data.max_length:
        wanted, got = f"fewer than data.max_length = {data.max_length} tokens", f"{tokens}"
        if data.overflow == "drop":
            raise Dropped(f"prompt: wanted {wanted}, got {got}")
        if data.overflow == "truncate":  # only ever shortens completions
            raise BadRow(pair.where, "prompt", wanted, got)
        raise UserError(
            f"{pair.where}: prompt: wanted {wanted}, got {got}; raise it, or set data.overflow to drop"
        )


def fit_pair(
    pair: Pair, prompt: EncodedPrompt, chat: ChatTokenizer, data: DataConfig
) -> tuple[Fitted, Fitted]:
    """Chosen and rejected, cut, refused or dropped as data.overflow says; an answer to learn by itself stands as both."""
    result: list[Fitted] = []
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if answer is None:  # nothing to compare with
            return result[0], result[0]
        ids = chat.completion(pair.messages, prompt, answer, pair.where, name)
        room = data.max_length - prompt.fixed
        _check_fits(pair, name, prompt.fixed + len(ids), data)
        result.append(Fitted(ids[:room], prompt.fixed, cut=len(ids) > room))
    chosen, rejected = result
    if np.array_equal(chosen.ids, rejected.ids):
        if chosen.cut or rejected.cut:
            raise Dropped("rejected: the same as chosen after truncation")
        raise BadRow(
            pair.where, "rejected", "an answer that differs from chosen", "the same answer as tokens"
        )
    return chosen, rejected


def fit_conversation(
    pair: Pair, prompt: EncodedPrompt, chat: ChatTokenizer, data: DataConfig, sizes: Sequence[tuple[int, int]] | None
) -> tuple[list[Fitted], str | None]:  # fmt: skip
    """All answers of a conversation, each behind what its template writes before it, and why the last of them were dropped.

    They are one sequence as far as the template leaves earlier turns as they were, and several where it does not.
    """
    if chat.sees_prompts_whole:
        wanted = "one answer a row for a model whose prompts see what is asked later"
        raise BadRow(pair.where, "turns", wanted, f"{1 + len(pair.later)} answers")
    sequences: list[np.ndarray] = []
    said, cut = pair.messages, False
    turns = [((), pair.chosen), *pair.later]
    for number, (question, answer) in enumerate(turns, start=1):
        said = (*said, *question)
        asked = chat.prompt(said, pair.where, sizes) if question else prompt
        ids = chat.completion(said, asked, answer, pair.where, "completion")
        said = (*said, ("assistant", (("text", answer),)))
        written = alike(asked.ids[asked.fixed :], ids[:-1])
        before, ids = np.concatenate([asked.ids[: asked.fixed], ids[:written]]), ids[written:]
        name = f"completion {number} of {len(turns)}"
        try:
            _check_fits(pair, name, len(before) + len(ids), data)
        except Dropped as dropped:
            if not sequences:
                raise
            return _behind(pair, prompt, sequences, cut, chat), str(dropped)
        room = max(0, data.max_length - len(before))
        cut = len(ids) > room
        if room:
            last = sequences[-1] if sequences else before[:0]
            if not np.array_equal(before[: len(last)], plain(last)):
                last = before[:0]
            elif sequences:
                sequences.pop()
            sequences.append(np.concatenate([last, ~before[len(last) :], ids[:room]]))
        if cut:
            break
    if not sequences:
        raise BadRow(
            pair.where, "prompt", f"fewer than data.max_length = {data.max_length} tokens", f"{len(before)}"
        )
    return _behind(pair, prompt, sequences, cut, chat), None


def _behind(
    pair: Pair, prompt: EncodedPrompt, sequences: list[np.ndarray], cut: bool, chat: ChatTokenizer
) -> list[Fitted]:
    """Whole sequences as what follows the part of the prompt that they begin with."""
    places = [check_beginning(prompt, ids, pair, chat) for ids in sequences]
    last = len(sequences) - 1
    return [Fitted(ids[at:], at, cut and n == last) for n, (ids, at) in enumerate(zip(sequences, places))]


def _check_fits(pair: Pair, name: str, total: int, data: DataConfig) -> None:
    if total <= data.max_length or data.overflow == "truncate":
        return
    if data.overflow == "error":
        raise UserError(
            f"{pair.where}: {name}: wanted at most data.max_length = {data.max_length} tokens with its prompt, "
            f"got {total}; raise it, or set data.overflow to truncate or drop"
        )
    raise Dropped(f"{name}: {total} tokens with its prompt, data.max_length is {data.max_length}")
