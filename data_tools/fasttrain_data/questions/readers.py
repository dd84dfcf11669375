"""Readers of question sources: each row becomes a draft, or says why it cannot.

Formats: SciGraphQA records, LRV-Instruction, LLaVA conversations, LLaVA question files, plain image+question.
Described in their data cards; field names are theirs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.jsonl import Row, is_unicode, read_rows
from fasttrain_data.questions.text import clean_text
from fasttrain_data.records import Turn
from fasttrain_data.unread import unread_image

Turns = Literal["first", "last", "each"]
Reader = Callable[["Row", str, "Turns | None"], Iterator["Draft"]]
ARXIV_FIGURE = re.compile(
    r"^(?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?_?\d{7})v\d+-(?:Figure|Table)", re.IGNORECASE
)
COORDINATES = re.compile(r"\bX:\s*\d+,?\s*Y:\s*\d+")
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_NAMED_OTHERWISE = ("scigraphqa", "lrv")  # formats whose rows name images under keys of their own
_QUESTION_KEYS = ("question", "prompt", "text", "instruction")
_NO_UNICODE = "text that is not valid Unicode"
# SciGraphQA's `response`: questions with their answers as the language model wrote them, line breaks included.
_ASKED = re.compile(r"^\s*Question:(.*?)^\s*Answer:(.*?)(?=^\s*Question:|\Z)", re.MULTILINE | re.DOTALL)
_REQUEST = re.compile(
    r"(?:please|can|could|describe|explain|summari[sz]e|compare|discuss|identify|list|tell|give|show|analy[sz]e|"
    r"interpret|what|which|how|why|when|where|who|is|are|do|does|did)\b",
    re.IGNORECASE,
)


class Unusable(Exception):
    """A row that cannot become a question; the text is the reason it is counted under."""


@dataclass
class Draft:
    """One question as its source tells it. `images` are names as written there."""

    source: str
    place: str
    question: str
    images: list[str] = field(default_factory=list)
    history: list[Turn] = field(default_factory=list)
    reference: str | None = None
    source_id: str | None = None
    category: str | None = None
    changed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        texts = (self.source, self.question, *self.images, self.reference, self.source_id, self.category)
        if not all(is_unicode(text) for text in texts if text is not None):
            raise Unusable(_NO_UNICODE)


def detect_source(row: Row) -> str | None:
    """The source format of a row, or None; by keys of null, which datasets fills up, only where the others tell none."""
    said = {key for key, value in row.items() if value is not None}
    return _format_of(said) or _format_of(row.keys())


def _format_of(keys: Set[str]) -> str | None:
    if "image_file" in keys and ("conversations" in keys or "q_a_pairs" in keys):
        return "scigraphqa"
    if "image_id" in keys and "question" in keys:
        return "lrv"
    if "conversations" in keys or "messages" in keys:
        return "llava"
    if "question_id" in keys and "text" in keys:
        return "llava-questions"
    if not keys.isdisjoint((*_QUESTION_KEYS, "turns")):
        return "plain"
    return None


def read_drafts(path: Path, form: str | None, turns: Turns | None) -> Iterator[Draft | tuple[str, str]]:
    """Drafts of one source file, or (place, reason) for a row that cannot be used.

    form: a key of READERS; None lets the first row decide, and every row that names its image as another format does,
    which files put together from several hold. turns: which human turns of a conversation
    become questions; None is the format's own habit (SciGraphQA first, LLaVA last with the rest as history).
    """
    first = form
    for place, row in read_rows(path):
        first = first or detect_source(row)
        try:
            _check_image_key(row, form)
            for draft in READERS[form or format_of_row(path, place, row, first)](row, place, turns):
                if not draft.images and (key := unread_image(row)):
                    draft.changed.append(f"{key} is not read: no image")
                yield draft
        except Unusable as problem:
            yield place, str(problem)


def format_of_row(path: Path, place: str, row: Row, first: str | None) -> str:
    """The row's own format if it tells an image, so that none is lost; else `first`, the format of the file's first row."""
    own = detect_source(row)
    tells = own in _NAMED_OTHERWISE or row.get("image") or row.get("images")
    form = own if own and tells else first or own
    if form is None:
        raise BadRow(path, place, "row", f"a record of one of: {', '.join(READERS)}", f"keys {sorted(row)}")
    return form


def _check_image_key(row: Row, form: str | None) -> None:
    """Unusable if the format that was named for its file does not read the image that it names."""
    if form is None or form in _NAMED_OTHERWISE or row.get("image") or row.get("images"):
        return
    own = detect_source(row)
    if own in _NAMED_OTHERWISE:
        raise Unusable(f"names its image as {own} does, not as {form}")


def split_source(spec: str) -> tuple[str | None, Path]:
    """A command-line source `FORMAT:PATH` or `PATH`."""
    form, colon, rest = spec.partition(":")
    if colon and form in READERS:
        return form, Path(os.path.expanduser(rest))  # noqa: PTH111 (no shell expands ~ behind a colon)
    if colon and not Path(spec).exists() and re.fullmatch(r"[a-z-]{2,}", form):
        raise UserError(
            f"{spec}: wanted one of the formats {', '.join(READERS)} before the colon, got {form}"
        )
    return None, Path(os.path.expanduser(spec))  # noqa: PTH111


def _read_scigraphqa(row: Row, place: str, turns: Turns | None) -> Iterator[Draft]:
    """One figure, written by a language model from the paper's text; later turns are often answer lines."""
    image = _string(row, "image_file")
    conversation = _conversation(row) or _q_a_pairs(row)
    humans = [text for role, text in conversation if role == "human"]
    if humans and not _asks(clean_text(humans[0])[0]):
        raise Unusable("first human turn asks nothing")
    asking = [clean_text(text)[0].endswith("?") for text in humans[1:]]
    cut = not all(asking)
    if cut:
        conversation = conversation[: 2 * (asking.index(False) + 1)]
    conversation, mended = _with_whole_answer(conversation, row.get("response"), cut)
    changed = ["fake human turns cut"] if cut else []
    base = Draft("scigraphqa", place, "", [image], source_id=_optional(row, "id") or image, changed=changed)
    for draft in _from_conversation(base, conversation, turns or "first"):
        if mended and len(draft.history) == (len(conversation) - 1) // 2 * 2:
            draft.changed.append(mended)
        yield draft


def _with_whole_answer(
    conversation: list[tuple[str, str]], response: Any, cut: bool
) -> tuple[list[tuple[str, str]], str | None]:
    """(the conversation with its last answer whole, what was done to it): of an answer of several lines, the turn has one.

    `response` has the others. Without it, or where it has another answer, one that a cut follows is left out.
    """
    if len(conversation) % 2 or not conversation:
        return conversation, None
    question, line = (clean_text(text)[0] for _, text in conversation[-2:])
    pairs = _ASKED.findall(response) if isinstance(response, str) else []
    answers = [clean_text(answer)[0] for asked, answer in pairs if clean_text(asked)[0] == question]
    whole = next((answer for answer in answers if answer.startswith(line)), None)
    if whole is None:
        return (conversation[:-1], "split answer left out") if cut else (conversation, None)
    mended = None if whole == line else "split answer put together again"
    return [*conversation[:-1], (conversation[-1][0], whole)], mended


def _q_a_pairs(row: Row) -> list[tuple[str, str]]:
    pairs = row.get("q_a_pairs") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) for pair in pairs):
        raise Unusable("q_a_pairs is not a list of pairs")
    result = [(role, text) for pair in pairs for role, text in zip(("human", "gpt"), pair)]
    if not all(isinstance(text, str) for _, text in result):
        raise Unusable("q_a_pairs holds something that is not text")
    return result


def _asks(text: str) -> bool:
    """A question or a request; the damaged records begin with a statement that belongs to an answer."""
    return not text or "?" in text or _REQUEST.match(text) is not None


def _read_lrv(row: Row, place: str, turns: Turns | None) -> Iterator[Draft]:
    """Visual Genome photos; the image file is the id with .jpg."""
    image_id = row.get("image_id")
    if not isinstance(image_id, str | int):
        raise Unusable("no image_id")
    question, changed = _question(row, "question")
    if COORDINATES.search(question):
        changed.append("holds pixel coordinates")
    yield Draft(
        "lrv",
        place,
        question,
        [photo(image_id)],
        reference=_optional(row, "answer"),
        source_id=str(image_id),
        category=_optional(row, "task"),
        changed=changed,
    )


def photo(image_id: Any) -> str:
    """The file name of an image of LRV-Instruction."""
    name = str(image_id)
    return name if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png") else f"{name}.jpg"


def _read_llava(row: Row, place: str, turns: Turns | None) -> Iterator[Draft]:
    base = Draft("llava", place, "", _images(row), source_id=_optional(row, "id"))
    conversation = _conversation(row, _SPEAKERS | {"system": "system"})
    begins = [role for role, _ in conversation[:1]]
    if row.get("system") and begins != ["system"]:  # LLaMA-Factory's column; a turn counts before it
        conversation.insert(0, ("system", _string(row, "system")))
    yield from _from_conversation(base, conversation, turns or "last")


def _read_llava_questions(row: Row, place: str, turns: Turns | None) -> Iterator[Draft]:
    question, changed = _question(row, "text")
    images = _images(row)
    source = "scigraphqa" if images and ARXIV_FIGURE.match(Path(images[0]).name) else "llava-questions"
    yield Draft(
        source,
        place,
        question,
        images,
        source_id=_optional(row, "question_id"),
        category=_optional(row, "category"),
        changed=changed,
    )


def _read_plain(row: Row, place: str, turns: Turns | None) -> Iterator[Draft]:
    """A question with `image` or `images`, optional `history`, `hint`, `options`; also our own questions.

    It stands under `question`, `prompt`, `text`, Alpaca's `instruction` (with `input`, and `output` as its answer) or
    FastChat's `turns`, of which the first is asked.
    """
    key = next((name for name in _QUESTION_KEYS if row.get(name) is not None), "turns")
    said, changed, answer = row, [], row.get("answer")
    if key == "instruction":
        answer = row.get("output")
        if isinstance(row[key], str) and isinstance(row.get("input"), str) and row["input"].strip():
            said, changed = {key: f"{row[key]}\n{row['input']}"}, ["input put with the instruction"]
    elif key == "turns" and isinstance(row.get(key), list) and row[key]:
        said, changed = {key: row[key][0]}, ["later turns left out"] if len(row[key]) > 1 else []
    question, repairs = _question(said, key)
    changed += repairs
    if around := _hint_and_options(row):
        question = around[0] + question + around[1]
        changed.append("hint or options put with the question")
    before = row.get("history") or []
    roles = ("system", "user", "assistant")
    if not isinstance(before, list) or not all(
        isinstance(turn, dict) and turn.get("role") in roles for turn in before
    ):
        raise Unusable("history is not a list of turns with role and text")
    history = [_turn(turn["role"], clean_text(str(turn.get("text", "")))[0]) for turn in before]
    yield Draft(
        str(row.get("source") or "plain"),
        place,
        question,
        _images(row),
        history,
        _optional(row, "reference_answer") or (None if answer is None else str(answer)),
        _first(row, "source_id", "id", "question_id", "index"),
        _optional(row, "category"),
        changed,
    )


def _hint_and_options(row: Row) -> tuple[str, str] | None:
    """What stands before and behind a question of several choices, as MMBench is asked: without it nobody can answer."""
    hint, options = row.get("hint"), row.get("options")
    if not isinstance(options, dict):
        return None
    options = {letter: text for letter, text in options.items() if text is not None}  # filled up by datasets
    if not options or not all(isinstance(text, str) for text in options.values()):
        return None
    before = f"{hint.strip()}\n" if isinstance(hint, str) and hint.strip() else ""
    return before, "".join(f"\n{letter}. {text}" for letter, text in options.items())


READERS: dict[str, Reader] = {
    "scigraphqa": _read_scigraphqa,
    "lrv": _read_lrv,
    "llava": _read_llava,
    "llava-questions": _read_llava_questions,
    "plain": _read_plain,
}


def _from_conversation(base: Draft, conversation: list[tuple[str, str]], turns: Turns) -> Iterator[Draft]:
    """Drafts of the chosen human turns; everything before a turn becomes its history, a system turn in front too."""
    changed = list(base.changed)
    cleaned: list[tuple[str, str]] = []
    for role, text in conversation:
        text, repairs = clean_text(text)
        changed += repairs
        cleaned.append((role, text))
    told = [_turn("system", text) for role, text in cleaned[:1] if role == "system"]
    cleaned = cleaned[len(told) :]
    if not cleaned or cleaned[0][0] != "human" or not cleaned[0][1]:
        raise Unusable("no question")
    if any(role != ("human", "gpt")[index % 2] for index, (role, _) in enumerate(cleaned)):
        raise Unusable("human and gpt turns do not alternate")
    positions = list(range(0, len(cleaned), 2))
    chosen = {"first": positions[:1], "last": positions[-1:], "each": positions}[turns]
    for at in chosen:
        said = [_turn("user" if role == "human" else "assistant", text) for role, text in cleaned[:at]]
        source_id = base.source_id if len(chosen) == 1 else f"{base.source_id}#{at // 2 + 1}"
        yield Draft(
            base.source,
            base.place,
            cleaned[at][1],
            base.images,
            told + said,
            cleaned[at + 1][1] if at + 1 < len(cleaned) else None,
            source_id,
            changed=list(dict.fromkeys(changed)),
        )


def _turn(role: Literal["system", "user", "assistant"], text: str) -> Turn:
    if not is_unicode(text):
        raise Unusable(_NO_UNICODE)
    return Turn(role=role, text=text)


def _conversation(row: Row, names: dict[str, str] = _SPEAKERS) -> list[tuple[str, str]]:
    turns = row.get("conversations") or row.get("messages") or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable("conversations is not a list of turns")
    result = []
    for turn in turns:
        role, value = (
            names.get(str(turn.get("from") or turn.get("role"))),
            turn.get("value", turn.get("content")),
        )
        if role is None or not isinstance(value, str):
            raise Unusable("a turn without known speaker and text")
        result.append((role, value))
    return result


def _question(row: Row, key: str) -> tuple[str, list[str]]:
    if not isinstance(row.get(key), str):
        raise Unusable("no question")
    text, changed = clean_text(row[key])
    if not text:
        raise Unusable("no question")
    return text, changed


def _images(row: Row) -> list[str]:
    images: Any = row.get("images")
    if images in (None, []):
        images = [] if row.get("image") is None else row["image"]
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) and name for name in images):
        raise Unusable("image is not a file name")
    if any(name.startswith("data:") for name in images):
        raise Unusable("image is a data: URL; wanted a file's name")
    return images


def _string(row: Row, key: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise Unusable(f"no {key}")
    return row[key]  # type: ignore[no-any-return]


def _optional(row: Row, key: str) -> str | None:
    value = row.get(key)
    return None if value is None else str(value)


def _first(row: Row, *keys: str) -> str | None:
    return next((str(row[key]) for key in keys if row.get(key) is not None), None)
