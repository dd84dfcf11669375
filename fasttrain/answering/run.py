"""Questions -> answers through a journal: what was answered once is not asked again, whenever the process died."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fasttrain.answering.decoding import Decoding, Reply
from fasttrain.answering.questions import Question
from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.progress import Progress, say


@dataclass(frozen=True)
class Answer:
    """A question with what was answered, turn by turn. finish: `stop`, `length` or what a server said."""

    question: Question
    turns: tuple[str, ...]
    finish: tuple[str, ...]
    tokens: int


class Failed(Exception):
    """A question that got no answer; the text begins with the name of what went wrong."""


class NotAsked(Failed):
    """A question that was left when another's failure ended the run; the text is that failure's."""


Done = Callable[[Question, "list[Reply] | Failed"], None]


class Answerer(Protocol):
    """Something that answers: a model in this process, or a server. version: decides, with the question, an answer."""

    @property
    def version(self) -> str: ...

    def images_of(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """Content hashes of each question's images."""

    def answer(self, questions: Sequence[Question], decoding: Decoding, done: Done) -> None:
        """Answer all questions in any order, telling `done` of each, once, with its replies, or with a failure."""


def answer_questions(
    questions: Sequence[Question], answerer: Answerer, decoding: Decoding, journal: Path
) -> tuple[list[Answer], dict[str, list[str]]]:
    """All answers in the questions' order, and what failed: question ids by the name of the failure.

    Each answer is in the journal file, under a hash of everything it depends on, before the next
    batch begins; what is asked twice (POPE's splits share half of their questions) is answered once.
    """
    from fasttrain_data.calls.journal import Journal

    keys = _keys(questions, answerer, decoding)
    key_of = {id(question): key for question, key in zip(questions, keys, strict=True)}
    failures: dict[str, list[str]] = {}
    with mistakes_of_data_tools(), Journal(journal) as kept:
        different = dict(zip(keys, questions, strict=True))
        missing = [question for key, question in different.items() if kept.get(key) is None]
        if held := sum(kept.get(key) is not None for key in keys):
            say(f"{held:,} of {len(questions):,} questions are answered in {journal}")
        speed = _Speed()
        left: list[NotAsked] = []
        with Progress("answers", len(missing), "questions") as progress:

            def done(question: Question, replies: list[Reply] | Failed) -> None:
                if isinstance(replies, Failed):
                    failures.setdefault(str(replies).partition(":")[0], []).append(str(question.id))
                    if isinstance(replies, NotAsked):  # thousands of them share one line
                        left.append(replies)
                        return
                    say(f"{question.where}: {replies}")
                else:
                    kept.append(key_of[id(question)], _entry(question, replies))
                    speed.questions += 1
                    speed.tokens += sum(reply.tokens for reply in replies)
                progress.tick(1, f"{speed.rate:,.0f} tokens/s")

            if missing:
                answerer.answer(missing, decoding, done)
                say(speed.account())
        if left:
            say(f"{len(left):,} questions were left, which the same command asks later: {left[0]}")
        answers = []
        for question, key in zip(questions, keys, strict=True):
            if (entry := kept.get(key)) is not None:
                answers.append(
                    Answer(question, tuple(entry["turns"]), tuple(entry["finish"]), int(entry["tokens"]))
                )
    return answers, failures


class _Speed:
    def __init__(self) -> None:
        self.questions, self.tokens, self._start = 0, 0, time.perf_counter()

    @property
    def rate(self) -> float:
        return self.tokens / max(1e-9, time.perf_counter() - self._start)

    def account(self) -> str:
        seconds = time.perf_counter() - self._start
        return f"{self.questions:,} questions answered in {seconds:.1f} s: {self.tokens:,} tokens, {self.rate:,.1f} tokens/s"


def _entry(question: Question, replies: list[Reply]) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "turns": [reply.text for reply in replies],
        "finish": [reply.finish for reply in replies],
        "tokens": sum(reply.tokens for reply in replies),
    }


def _keys(questions: Sequence[Question], answerer: Answerer, decoding: Decoding) -> list[str]:
    """A hash per question of model, conversation, images and decoding: what is equal in all of them is answered alike."""
    from fasttrain_data.ids import content_hash

    keys = []
    for question, images in zip(questions, answerer.images_of(questions), strict=True):
        keys.append(
            content_hash(
                answerer.version,
                [question.messages, question.later_turns, images],
                [decoding.max_new_tokens, decoding.temperature_of(question), decoding.top_p],
                # a greedy answer has no seed; a sampled one has the question's own
                [decoding.seed, str(question.id)] if decoding.temperature_of(question) > 0 else None,
            )
        )
    return keys


def check_output(output: Path, *inputs: Path) -> None:
    """UserError if the output is a folder, an input, or a file that this command did not write."""
    from fasttrain_data.calls.journal import journal_path
    from fasttrain_data.jsonl import check_output as check

    with mistakes_of_data_tools():
        check(output, *inputs)
    if output.exists() and not journal_path(output).exists():
        raise UserError(
            f"--out: {output} exists and has no journal beside it, so it was not written here; wanted a new file"
        )
