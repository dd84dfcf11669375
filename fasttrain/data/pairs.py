"""One row of a pair file -> one checked pair: prompt messages, images, chosen and rejected text.

Reads TRL's vision preference format (explicit or implicit prompt) and the short form with plain strings; for supervised
fine-tuning also TRL's prompt-completion format, whose rows have no rejected text.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.data.bad_row import BadRow, printable
from fasttrain.data.images import ImageRef, check_header, resolve_inside
from fasttrain_data.image_files import data_url_bytes
from fasttrain_data.unread import unread_column, unread_field

PLACEHOLDER = "<image>"
IMAGE = ("image", "")
Part = tuple[str, str]  # ("text", its text) or IMAGE
Message = tuple[str, tuple[Part, ...]]  # role, parts


@dataclass(frozen=True, kw_only=True)
class Pair:
    where: str
    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...]
    chosen: str
    rejected: str | None  # None: an answer to learn, by itself
    later: tuple[
        tuple[tuple[Message, ...], str], ...
    ] = ()  # what is said after it, and the next answer to learn


def read_pair(row: dict[str, Any], where: str, image_root: Path) -> Pair:
    """Check one row; BadRow names the first field that is wrong. Image files are found, not opened."""
    for key in ("chosen", "rejected"):
        if row.get(key) is None and (row.get("completion") is not None or isinstance(row.get("turns"), list)):
            raise BadRow(where, key, "a pair", "one answer to learn, which is for fasttrain sft")
        if row.get(key) is None:
            raise BadRow(where, key, "an answer", _nothing(row))
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None and not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise BadRow(where, "prompt", "a prompt", _nothing(row))
    if prompt is None or _is_said_again(prompt, chosen, rejected):
        said, (prompt, chosen, rejected) = prompt, _split_common_prompt(chosen, rejected, where)
        _check_said_again(said, prompt, where)
    messages, images = read_prompt(row, prompt, where, image_root)
    chosen = _read_completion(chosen, "chosen", where)
    rejected = _read_completion(rejected, "rejected", where)
    if chosen == rejected:
        raise BadRow(where, "rejected", "an answer that differs from chosen", "the same answer")
    name = where if row.get("id") is None else printable(str(row["id"]))
    return Pair(where=where, id=name, messages=messages, images=images, chosen=chosen, rejected=rejected)


def read_prompt(
    row: dict[str, Any], prompt: Any, where: str, image_root: Path
) -> tuple[tuple[Message, ...], tuple[ImageRef, ...]]:
    """A prompt (text or messages) with the row's images, placeholders made explicit; BadRow names what is wrong."""
    if name := unread_column(row):
        raise BadRow(where, name, f"a row without {name}", row[name])
    images = _read_images(row, where, image_root)
    messages = _place_images(_read_prompt(prompt, where), len(images), where)
    if not any(text.strip() for _, parts in messages for _, text in parts) and IMAGE not in messages[-1][1]:
        raise BadRow(where, "prompt", "some text or an image", "an empty prompt")
    return messages, images


def read_example(row: dict[str, Any], where: str, image_root: Path) -> Pair:
    """The answer to learn from a prompt-completion row or a pair's chosen answer; BadRow as in `read_pair`."""
    field = "completion" if row.get("completion") is not None else "chosen"
    prompt, answer, turns = row.get("prompt"), row.get(field), row.get("turns")
    if answer is None and isinstance(turns, list) and turns:  # a conversation, as `read_taught` puts it
        answer, turns = turns[:1], turns[1:]
    else:
        turns = []
    if answer is None:
        raise BadRow(where, "completion", "an answer to learn (or chosen, in a pair file)", _nothing(row))
    if row.get("label") is False and field == "completion":  # TRL's unpaired preferences
        raise BadRow(where, "label", "an answer to learn", "false: one that is not wanted")
    whole = isinstance(answer, list) and len(answer) > 1
    if (whole and prompt is None) or _is_said_again(prompt, answer):
        said, prompt, answer = prompt, answer[:-1], answer[-1:]  # TRL's implicit prompt
        _check_said_again(said, prompt, where)
    if prompt is None:
        raise BadRow(where, "prompt", "a prompt", _nothing(row))
    messages, images = read_prompt(row, prompt, where, image_root)
    name = where if row.get("id") is None else printable(str(row["id"]))
    text, later = _read_completion(answer, field, where), tuple(_read_turns(turns, where))
    return Pair(
        where=where, id=name, messages=messages, images=images, chosen=text, rejected=None, later=later
    )


def _read_turns(turns: list[Any], where: str) -> Iterator[tuple[tuple[Message, ...], str]]:
    """What is said before each answer, and the answer."""
    asked: list[Any] = []
    for turn in turns:
        if isinstance(turn, dict) and turn.get("role") == "assistant":
            messages = tuple(_read_prompt(asked, where))
            if any(IMAGE in parts for _, parts in messages):
                raise BadRow(where, "turns", "images in the prompt only", "one in a later turn")
            yield messages, _read_completion([turn], "turns", where)
            asked = []
        else:
            asked.append(turn)


def check_images(pair: Pair) -> None:
    """Open the header of every image; BadRow if one is missing or no image."""
    for ref in pair.images:
        check_image(ref, pair.where)


def check_image(ref: ImageRef, where: str) -> None:
    """Open the header of an image; BadRow, at `where`, if it is missing or no image."""
    try:
        check_header(ref)
    except FileNotFoundError:
        raise BadRow(where, "images", "an existing image file", str(ref.path)) from None
    except (ValueError, OSError) as error:
        raise BadRow(where, "images", "an image", f"{ref.name()} ({error})") from None


def _nothing(row: dict[str, Any]) -> str:
    """For a row of another layout or a misspelt key: what it has instead."""
    keys = [printable(str(key))[:40] for key in row]
    more = ", ..." if len(keys) > 10 else ""
    return f"nothing; the row has {', '.join(keys[:10])}{more}" if keys else "nothing"


def _split_common_prompt(chosen: list[Any], rejected: list[Any], where: str) -> tuple[Any, Any, Any]:
    """TRL's implicit prompt: both answers are whole conversations; what they share is the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadRow(where, "prompt", "a prompt, or conversations that begin alike", "neither")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _is_said_again(prompt: Any, *answers: Any) -> bool:
    """Whether answers are whole conversations beside a prompt, which is then their last question (ultrafeedback_binarized)."""
    return isinstance(prompt, str) and all(isinstance(answer, list) and len(answer) > 1 for answer in answers)


def _check_said_again(prompt: Any, shared: list[Any], where: str) -> None:
    if prompt is None:
        return
    parts = _read_prompt(shared, where)[-1][1]
    if "".join(text for _, text in parts) != prompt:
        raise BadRow(where, "prompt", "the last question that the conversations share, or none", prompt)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(where, field, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(where, field, "valid Unicode", "a lone surrogate") from None
    return value


def _read_parts(content: Any, field: str, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (("text", _text(content, field, where)),)
    if not isinstance(content, list):
        raise BadRow(where, field, "text or a list of parts", content)
    parts: list[Part] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append(IMAGE)
        elif kind == "text":
            parts.append(("text", _text(part.get("text"), field, where)))
        else:
            raise BadRow(where, field, 'parts of type "text" or "image", and image files under images', part)
    return tuple(parts)


def _read_prompt(prompt: Any, where: str) -> list[Message]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise BadRow(where, "prompt", "text or a list of messages", prompt)
    messages: list[Message] = []
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(where, "prompt", "messages with role and content", message)
        _refuse_unread(message, "prompt", where)
        role = _text(message["role"], "prompt", where)
        messages.append((role, _read_parts(message.get("content"), "prompt", where)))
    if messages[-1][0] not in ("user", "tool"):
        raise BadRow(where, "prompt", "a last message by the user", f"one by {messages[-1][0]!r}")
    return messages


def _refuse_unread(message: dict[str, Any], field: str, where: str) -> None:
    name = unread_field(message)
    if name:
        raise BadRow(where, field, f"messages without {name}", message[name])


def _read_completion(value: Any, field: str, where: str) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise BadRow(where, field, "one message by the assistant", value)
        _refuse_unread(value[0], field, where)
        parts = _read_parts(value[0].get("content"), field, where)
        if IMAGE in parts:
            raise BadRow(where, field, "text only", "an image")
        text = "".join(text for _, text in parts)
    else:
        text = _text(value, field, where)
    if not text.strip():
        raise BadRow(where, field, "a non-empty answer", text)
    return text


def _place_images(messages: list[Message], images: int, where: str) -> tuple[Message, ...]:
    """Make the image placeholders explicit; their number must be the number of images."""
    given = sum(part == IMAGE for _, parts in messages for part in parts)
    if not given and images:
        literal = sum(text.count(PLACEHOLDER) for _, parts in messages for _, text in parts)
        if literal:
            messages = [(role, _split_placeholders(parts)) for role, parts in messages]
            given = literal
        else:
            first = next(index for index, (role, _) in enumerate(messages) if role in ("user", "tool"))
            role, parts = messages[first]
            messages[first] = (role, (IMAGE,) * images + parts)
            given = images
    if given != images:
        raise BadRow(
            where,
            "images",
            f"as many images as placeholders in the prompt ({given})",
            f"{images} image(s)" if images else "none under images or image",
        )
    return tuple(messages)


def _split_placeholders(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Literal `<image>` in text becomes an image part; the line breaks beside it belong to the template."""
    result: list[Part] = []
    for kind, text in parts:
        if kind != "text" or PLACEHOLDER not in text:
            result.append((kind, text))
            continue
        pieces = text.split(PLACEHOLDER)
        for index, piece in enumerate(pieces):
            if index:
                result.append(IMAGE)
                piece = piece.removeprefix("\n")
            if index + 1 < len(pieces):
                piece = piece.removesuffix("\n")
            if piece.strip():
                result.append(("text", piece))
    return tuple(result)


def _read_images(row: dict[str, Any], where: str, root: Path) -> tuple[ImageRef, ...]:
    images, field = row.get("images"), "images"
    if row.get("image") is not None:
        if images:
            raise BadRow(where, "image", "one of image and images", "both")
        images, field = [row["image"]], "image"
    if images is None:
        return ()
    if not isinstance(images, list):
        images = [images]
    return tuple(_read_image(image, field, where, root) for image in images)


def _read_image(image: Any, field: str, where: str, root: Path) -> ImageRef:
    if isinstance(image, dict):
        content = image.get("bytes")
        if isinstance(content, dict) and isinstance(content.get("base64"), str):
            try:
                content = base64.b64decode(content["base64"], validate=True)
            except ValueError:
                raise BadRow(where, field, "base64 image bytes", "broken base64") from None
        if isinstance(content, bytes) and content:
            return ImageRef(content=content)
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise BadRow(where, field, "an image path or embedded bytes", image)
    if image.startswith("data:"):
        if content := data_url_bytes(image):
            return ImageRef(content=content)
        raise BadRow(where, field, "a data URL with base64", image)
    try:
        path = resolve_inside(root, image)
        found = path.is_file()
    except ValueError as error:
        raise BadRow(where, field, str(error), image) from None
    except OSError as error:  # longer than a file name can be, as inline base64 is
        raise BadRow(where, field, f"the path of an image ({error.strerror})", image) from None
    if not found:
        raise BadRow(where, field, "an existing image file", str(path))
    return ImageRef(path=path)
