"""Question files: LLaVA's, FastChat's, ours and prompts of pair files, read to one form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from fasttrain.data.bad_row import BadRow
from fasttrain.data.images import ImageRef, hash_bytes
from fasttrain.data.pairs import IMAGE, PLACEHOLDER, Message, check_image, read_prompt
from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.files import HashMemo
from fasttrain.progress import say
from fasttrain_data.unread import unread_image

_TEXT_KEYS = ("text", "question", "prompt", "instruction")


class ImageSource(Protocol):
    """An image that is read when it is needed. `data.images.ImageRef` is one; so is a cell of a table."""

    def read(self) -> bytes: ...
    def name(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked: `messages` up to the user's turn, then, after each answer, one of `later_turns`.

    id: as the file has it. where: file and line. temperature: this question's own, before the run's. row: the file's row.
    """

    id: str | int
    where: str
    messages: tuple[Message, ...]
    later_turns: tuple[str, ...] = ()
    images: tuple[ImageSource, ...] = ()
    temperature: float | None = None
    row: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def turns(self) -> int:
        return 1 + len(self.later_turns)

    @property
    def text(self) -> str:
        """The first question's text, without image placeholders."""
        return "".join(text for kind, text in self.messages[-1][1] if kind == "text")


def read_questions(path: Path, image_root: Path | None = None, limit: int | None = None) -> list[Question]:
    """The questions of a JSON-lines file or JSON array, all or the first `limit`, behind which nothing is read.

    UserError names the first mistake, image headers included.
    """
    from fasttrain_data.jsonl import read_rows

    root = image_root or path.parent
    with mistakes_of_data_tools():
        rows = list(islice(read_rows(path), limit))
    questions = [
        question_of(row, f"{path} {place}", root, number) for number, (place, row) in enumerate(rows, start=1)
    ]
    if not questions:
        raise UserError(f"{path}: wanted at least one question, got none")
    check_ids(questions)
    check_image_files(questions)
    _warn_of_unread_images(questions)
    return questions


def _warn_of_unread_images(questions: Sequence[Question]) -> None:
    blind = [(question.where, key) for question in questions if (key := unread_image(question.row))]
    for where, key in blind[:1]:
        say(
            f"warning: {where}: {key} is not read; images go under images or image; questions asked without any: {len(blind):,}"
        )


def question_of(row: dict[str, Any], where: str, image_root: Path, number: int) -> Question:
    """One row. The question stands under `turns` (several), `text`, `question`, `prompt` or `instruction`."""
    name = question_name(row, number)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise BadRow(where, "question_id", "text or an integer", name)
    turns = row.get("turns")
    later: tuple[str, ...] = ()
    if turns is None:
        prompt = _single(row, where)
    else:
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(t, str) and t.strip() for t in turns)
        ):
            raise BadRow(where, "turns", "a list of texts", turns)
        prompt, later = turns[0], tuple(turns[1:])
    if any(PLACEHOLDER in turn for turn in later):
        raise BadRow(where, "turns", f"{PLACEHOLDER} in the first turn only", "one in a later turn")
    messages, images = read_prompt(row, _with_history(row, prompt, where), where, image_root)
    return Question(id=name, where=where, messages=messages, later_turns=later, images=images, row=row)


def question_name(row: dict[str, Any], number: int) -> Any:
    """The row's id, unchecked; its place in the file, counted from 1, where it has none."""
    name = row.get("question_id", row.get("id"))
    return number if name is None else name


def _single(row: dict[str, Any], where: str) -> Any:
    given = [key for key in _TEXT_KEYS if row.get(key) is not None]
    if not given:
        got = "conversations: make questions of them with `fasttrain-data questions`"
        wanted = f"a question under turns, {', '.join(_TEXT_KEYS)}"
        raise BadRow(
            where, "question", wanted, got if "conversations" in row else f"keys {', '.join(row) or 'none'}"
        )
    value = row[given[0]]
    if given[0] != "prompt" and not isinstance(value, str):
        raise BadRow(where, given[0], "text", value)
    return value


def _with_history(row: dict[str, Any], prompt: Any, where: str) -> Any:
    """Earlier turns of a record of `fasttrain-data questions`, in front of its question."""
    history = row.get("history")
    if not history or not isinstance(prompt, str):
        return prompt
    if not isinstance(history, list) or not all(
        isinstance(t, dict) and "role" in t and "text" in t for t in history
    ):
        raise BadRow(where, "history", "turns with role and text", history)
    earlier = [{"role": turn["role"], "content": turn["text"]} for turn in history]
    return [*earlier, {"role": "user", "content": prompt}]


def with_suffix(question: Question, suffix: str) -> Question:
    """The question with a line of instruction under it; unchanged if it ends with that line already."""
    if not suffix or question.text.rstrip().endswith(suffix):
        return question
    *earlier, (role, parts) = question.messages
    *before, (kind, text) = parts
    ended = [*before, ("text", f"{text}\n{suffix}")] if kind == "text" else [*parts, ("text", suffix)]
    return replace(question, messages=(*earlier, (role, tuple(ended))))


def check_ids(questions: Sequence[Question]) -> None:
    """UserError for two questions of the same id: their answers could not be told apart."""
    seen: dict[str, str] = {}
    for question in questions:
        first = seen.setdefault(str(question.id), question.where)
        if first != question.where:
            raise BadRow(
                question.where, "question_id", f"an id of its own, {first} has it too", str(question.id)
            )


def check_image_files(questions: Sequence[Question]) -> None:
    """Open the header of every image once; BadRow names the first question whose image is none."""
    seen: set[Path] = set()
    for question in questions:
        for image in question.images:
            if isinstance(image, ImageRef) and image.path is not None:
                if image.path in seen:
                    continue
                seen.add(image.path)
                check_image(image, question.where)
            else:
                check_image(ImageRef(content=image.read()), question.where)


def image_hashes(questions: Sequence[Question], memo: HashMemo) -> Iterator[tuple[str, ...]]:
    """Content hashes of each question's images; files that were hashed before are not read again."""
    for question in questions:
        yield tuple(
            memo(image.path) if isinstance(image, ImageRef) and image.path else hash_bytes(image.read())
            for image in question.images
        )


def next_turn(messages: tuple[Message, ...], answer: str, turn: str) -> tuple[Message, ...]:
    """The conversation with an answer and the user's next turn."""
    return (*messages, ("assistant", (("text", answer),)), ("user", (("text", turn),)))


def image_count(messages: tuple[Message, ...]) -> int:
    return sum(part == IMAGE for _, parts in messages for part in parts)
