"""Messages with content parts: placeholders in text become image parts, and back."""

from __future__ import annotations

from typing import Any

from fasttrain_data.errors import BadRow
from fasttrain_data.unread import unread_field

PLACEHOLDER = "<image>"
Message = dict[str, Any]
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class Place:
    """Where a row stands, to raise errors from."""

    def __init__(self, file: str, place: str) -> None:
        self.file, self.place = file, place

    def bad(self, field: str, wanted: str, got: Any) -> BadRow:
        return BadRow(self.file, self.place, field, wanted, "nothing" if got is None else got)

    def check_read(self, turn: dict[str, Any], field: str) -> None:
        """BadRow for a turn with a field that would be lost."""
        if name := unread_field(turn):
            raise self.bad(field, f"messages without {name}", turn[name])

    def text(self, value: Any, field: str) -> str:
        if not isinstance(value, str):
            raise self.bad(field, "text", value)
        return value


def parts_of(text: str) -> list[dict[str, str]]:
    """Text with `<image>` in it as parts; the line breaks beside a placeholder belong to templates."""
    parts: list[dict[str, str]] = []
    pieces = text.split(PLACEHOLDER)
    for index, piece in enumerate(pieces):
        if index:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if index + 1 < len(pieces):
            piece = piece.removesuffix("\n")
        if piece.strip() or len(pieces) == 1:
            parts.append({"type": "text", "text": piece})
    return parts


def text_of(message: Message) -> str:
    """A message's parts as one text with placeholders, images in front as `<image>` and a line break."""
    content = message["content"]
    if isinstance(content, str):
        return content
    pieces = []
    for part in content:
        pieces.append(f"{PLACEHOLDER}\n" if part["type"] == "image" else part["text"])
    return "".join(pieces)


def message(role: str, text: str) -> Message:
    return {"role": role, "content": parts_of(text)}


def answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def place_images(messages: list[Message], images: int, place: Place) -> list[Message]:
    """Check placeholders against images; if the prompt has none at all, put them in front of the first user turn."""
    given = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if not given and images:
        for index, turn in enumerate(messages):
            if turn["role"] == "user":
                content = [{"type": "image"}] * images + turn["content"]
                return [*messages[:index], {**turn, "content": content}, *messages[index + 1 :]]
    if given != images:
        raise place.bad(
            "images",
            f"as many images as placeholders in the prompt ({given})",
            f"{images} image(s)" if images else "none under images or image",
        )
    return messages


def said_in(turn: Any, field: str, place: Place) -> tuple[str, Any]:
    """(role, content) of a turn written as {from, value} or {role, content}; a file of both fills up the others with null."""
    if not isinstance(turn, dict):
        raise place.bad(field, "a turn", turn)
    speaker, content = (
        next((turn[key] for key in keys if turn.get(key) is not None), None)
        for keys in (("from", "role"), ("value", "content"))
    )
    role = ROLES.get(str(speaker))
    if role is None:
        raise place.bad(field, "a turn by human, gpt, user, assistant or system", speaker)
    place.check_read(turn, field)
    return role, content


def turn_of(value: Any, field: str, place: Place) -> tuple[str, str]:
    """(role, text) of a turn."""
    role, content = said_in(value, field, place)
    return role, place.text(content, field)


def turns_of(value: Any, field: str, place: Place) -> list[tuple[str, str]]:
    if not isinstance(value, list):
        raise place.bad(field, "a list of turns", value)
    return [turn_of(turn, field, place) for turn in value]


def check_answer(text: str, field: str, place: Place) -> str:
    if not text.strip():
        raise place.bad(field, "a non-empty answer", text)
    return text
