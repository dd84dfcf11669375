"""Answers to learn in other projects' layouts: conversations (`messages`, `conversations`) and alpaca's `output`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fasttrain_data.errors import BadRow
from fasttrain_data.formats.messages import (
    Message,
    Place,
    check_answer,
    message,
    place_images,
    said_in,
    text_of,
)
from fasttrain_data.formats.read import alpaca_prompt, images_of, message_parts, other_columns, refuse_boxes
from fasttrain_data.formats.table_rows import first_of, iterate_rows
from fasttrain_data.jsonl import Row

_ELSEWHERE = ("prompt", "completion", "chosen", "rejected", "rejected_response", "rejected_messages")
# what becomes prompt, completion and images
_READ = (
    "messages",
    "conversations",
    "system",
    "instruction",
    "input",
    "output",
    "history",
    "images",
    "image",
)
# ms-swift's, Axolotl's and OpenAI's marks of an answer that is not learned
_SILENT = ("loss", "train", "weight")


def is_taught(row: Row) -> bool:
    """Whether a record is a conversation, or alpaca's question and output, that no other layout claims."""
    if any(row.get(key) is not None for key in _ELSEWHERE):
        return False
    asked = row.get("instruction") or row.get("input")
    return isinstance(row.get(_field(row)), list) or bool(asked and isinstance(row.get("output"), str))


def read_taught(path: Path, bad: Callable[[BadRow], object]) -> Iterator[Row]:
    """Rows of prompt and `completion`, or of prompt and `turns` where more answers follow the first, streamed.

    Every answer of the assistant is one to learn behind all that was said before it: the tokens that LLaMA-Factory, ms-swift, and
    TRL with `assistant_only_loss` learn. A row has its images in its prompt: one more begins a new row, as every answer does beside a
    system's turn. Rows that are wrong go to `bad`.
    """
    for file, name, row in iterate_rows(path, bad):
        try:
            rows = list(_answers(row, Place(file, name)))
        except BadRow as error:
            bad(error)
        else:
            yield from rows


def _field(row: Row) -> str:
    """The key under which the answers stand."""
    return next((key for key in ("messages", "conversations") if row.get(key) is not None), "output")


def _answers(row: Row, place: Place) -> Iterator[Row]:
    if row.get("kto_tag") is False:  # LLaMA-Factory's
        raise place.bad("kto_tag", "an answer to learn", "false: one that is not wanted")
    field = _field(row)
    said = row.get(field)
    if isinstance(said, list):
        turns = [_turn(turn, field, place) for turn in said]
        if row.get("system") and (not turns or turns[0]["role"] != "system"):
            turns.insert(0, message("system", place.text(row["system"], "system")))
    else:
        turns = [*alpaca_prompt(row, place), message("assistant", place.text(said, field))]
    images = images_of(first_of(row, "images", "image"), place)
    turns = place_images(turns, len(images), place)
    taught = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not taught or any(index == 0 or turns[index - 1]["role"] != "user" for index in taught):
        raise place.bad(field, "answers behind a question each", [turn["role"] for turn in turns])
    texts = [text_of(turn) for turn in turns]
    refuse_boxes(row, texts, place)
    for index in taught:
        check_answer(texts[index], field, place)
    kept = other_columns(row, *_READ, *_ELSEWHERE)
    # some templates move the system's turn to the last question: what stands before an image is then another in every turn
    apart = turns[0]["role"] == "system" and _has_image(turns)
    begins = [
        index
        for number, index in enumerate(taught)
        if not number or apart or _has_image(turns[taught[number - 1] : index])
    ]
    for number, (index, end) in enumerate(zip(begins, [*begins[1:], len(turns)]), start=1):
        last = max(answer for answer in taught if answer < end)
        shown = sum(part["type"] == "image" for turn in turns[:index] for part in turn["content"])
        name = row.get("id")
        yield {
            **kept,
            "id": name if name is None or len(begins) == 1 else f"{name}#{number}",
            "images": images[:shown],
            "prompt": turns[:index],
            **({"completion": [turns[index]]} if last == index else {"turns": turns[index : last + 1]}),
        }


def _has_image(turns: list[Message]) -> bool:
    return any(part["type"] == "image" for turn in turns for part in turn["content"])


def _turn(turn: Any, field: str, place: Place) -> Message:
    """A turn whose content is text or parts."""
    role, content = said_in(turn, field, place)
    for key in _SILENT:
        if role == "assistant" and turn.get(key) in (False, 0):
            raise place.bad(field, f"answers that are all learned, without {key}", turn[key])
    return {"role": role, "content": message_parts(content, field, place)}
