"""The quick way to read a row in our own layouts, where nothing about it is unusual; everything else goes to `read_pair`.

What comes out is what `read_pair` would give; what it would refuse is never read here.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.data.images import ImageRef, hash_bytes, resolve_inside
from fasttrain.data.pairs import IMAGE, PLACEHOLDER, Message, Pair, Part
from fasttrain_data.unread import unread_column, unread_field

_ROLES = ("user", "system", "assistant")
_REMEMBERED = 20_000


class PlainPair(NamedTuple):
    """The fields of a Pair that the first pass over a file asks for."""

    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...]
    sizes: tuple[int, ...]  # bytes of each image
    chosen: str
    rejected: str | None
    later: bool = False  # more turns of a conversation follow

    def key(self) -> bytes:
        """16 bytes, equal for rows that may share a group: same prompt, same image sizes in bytes."""
        return blake2b(repr((self.messages, self.sizes)).encode(), digest_size=16).digest()

    def beginning(self) -> bytes:
        """16 bytes, equal for rows that begin alike up to their last image, by path or content; empty without images."""
        places = [
            (n, m)
            for n, (_, parts) in enumerate(self.messages)
            for m, part in enumerate(parts)
            if part == IMAGE
        ]
        if not places:
            return b""
        last, end = places[-1]
        role, parts = self.messages[last]
        images = [str(ref.path) if ref.content is None else hash_bytes(ref.content) for ref in self.images]
        known = (self.messages[:last], role, parts[: end + 1], images, self.sizes)
        return blake2b(repr(known).encode("utf-8", "surrogateescape"), digest_size=16).digest()

    @classmethod
    def of(cls, pair: Pair) -> PlainPair:
        """OSError if an image file is missing."""
        sizes = tuple(ref.size() for ref in pair.images)
        return cls(pair.messages, pair.images, sizes, pair.chosen, pair.rejected, bool(pair.later))


class PlainRows:
    """Reads rows of one process; remembers the image files that it has found, which many rows may share."""

    def __init__(self) -> None:
        self._found: dict[tuple[Path, str], tuple[ImageRef, int]] = {}

    def read(self, row: dict[str, Any], root: Path) -> PlainPair | None:
        """The row's pair; None if it has to be read by `read_pair`."""
        get = row.get
        chosen, rejected = _answer(get("chosen")), _answer(get("rejected"))
        if chosen is None or rejected is None or chosen == rejected or unread_column(row):
            return None
        messages = _messages(get("prompt"))
        if messages is None:
            return None
        images = get("images")
        if get("image") is not None:
            if images:
                return None
            images = [get("image")]
        if not images and images is not None and type(images) is not list:
            return None
        placed = sum([parts.count(IMAGE) for _, parts in messages])
        if not images:
            return None if placed else PlainPair(messages, (), (), chosen, rejected)
        if type(images) is not list:
            images = [images]
        if not placed:
            messages = _with_images(messages, len(images))
        elif placed != len(images):
            return None
        known = [self._image(name, root) for name in images]
        if messages is None or None in known:
            return None
        refs, sizes = zip(*known)  # type: ignore[arg-type]
        return PlainPair(messages, refs, sizes, chosen, rejected)

    def _image(self, name: Any, root: Path) -> tuple[ImageRef, int] | None:
        if type(name) is not str or not name:
            return None
        found = self._found.get((root, name))
        if found is None:
            try:
                path = resolve_inside(root, name)
                if not path.is_file():
                    return None
                found = ImageRef(path=path), path.stat().st_size
            except (OSError, ValueError):
                return None
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            self._found[root, name] = found
        return found


def _is_said(text: str) -> bool:
    """Whether there is something in a text, and nothing that UTF-8 cannot hold."""
    if text.isascii():
        return bool(text) and not text.isspace()
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return not text.isspace()


def _with_images(messages: tuple[Message, ...], images: int) -> tuple[Message, ...] | None:
    """The images in front of the first question; None where the texts hold literal placeholders."""
    if any(PLACEHOLDER in text for _, parts in messages for _, text in parts):
        return None
    first = next(index for index, (role, _) in enumerate(messages) if role == "user")
    role, parts = messages[first]
    return (*messages[:first], (role, (IMAGE,) * images + parts), *messages[first + 1 :])


def _messages(prompt: Any) -> tuple[Message, ...] | None:
    if type(prompt) is str:
        return (("user", (("text", prompt),)),) if _is_said(prompt) else None
    if type(prompt) is not list or not prompt:
        return None
    messages: list[Message] = []
    role: Any = None
    for message in prompt:
        if type(message) is not dict or unread_field(message):
            return None
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            return None
        if type(content) is str:
            if not _is_said(content):
                return None
            messages.append((role, (("text", content),)))
            continue
        if type(content) is not list or not content:
            return None
        parts: list[Part] = []
        for part in content:
            if type(part) is not dict:
                return None
            kind, text = part.get("type"), part.get("text")
            if kind == "image":
                parts.append(IMAGE)
            elif kind == "text" and type(text) is str and _is_said(text):
                parts.append(("text", text))
            else:
                return None
        messages.append((role, tuple(parts)))
    return tuple(messages) if role == "user" else None


def _answer(value: Any) -> str | None:
    if type(value) is list:
        if len(value) != 1 or type(value[0]) is not dict or value[0].get("role") != "assistant":
            return None
        if unread_field(value[0]):
            return None
        value = value[0].get("content")
        if type(value) is list:
            if len(value) != 1 or type(value[0]) is not dict or value[0].get("type") != "text":
                return None
            value = value[0].get("text")
    return value if type(value) is str and _is_said(value) else None
