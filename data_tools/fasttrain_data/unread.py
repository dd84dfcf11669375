"""What a row may hold that a chat template would write and that nothing here reads: told, never passed over."""

from __future__ import annotations

import re
from typing import Any

_FIELDS = frozenset(("tool_calls", "reasoning_content", "thinking", "reasoning"))
_COLUMNS = frozenset(("tools", "videos", "audios", "chat_template_kwargs"))

_IMAGE_WORD = re.compile(r"image|img|picture|photo")


def unread_image(row: dict[str, Any]) -> str | None:
    """A key that seems to hold an image and is none that is read, in a row without `images` and `image`."""
    if row.get("images") or row.get("image"):
        return None
    found = (key for key, value in row.items() if isinstance(value, str | list | dict) and value)
    return next((key for key in found if _IMAGE_WORD.search(key.lower())), None)


def unread_field(message: dict[str, Any]) -> str | None:
    """A field of a message besides its content that a chat template may write and that is not read here."""
    if _FIELDS.isdisjoint(message):
        return None
    return next((name for name in message if name in _FIELDS and message[name]), None)


def unread_column(row: dict[str, Any]) -> str | None:
    """A column with what decides a prompt's text besides its messages and that is not read here."""
    if _COLUMNS.isdisjoint(row):
        return None
    return next((name for name in row if name in _COLUMNS and not _says_nothing(row[name])), None)


def _says_nothing(value: Any) -> bool:
    """LLaMA-Factory's no tools are "[]"; datasets fills the keys that only other rows have with null."""
    if isinstance(value, dict):
        return all(item is None for item in value.values())
    return not value or value in ("[]", "{}", "null")
