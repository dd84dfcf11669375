"""A user's mistake, told in one line, and the exit codes of the command."""

from __future__ import annotations

import re
from typing import Any

EXIT_OK = 0
EXIT_MISTAKE = 2
EXIT_TYPED_FAILURES = 3

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class UserError(Exception):
    """A mistake in command, data or files: shown as one line, exit code 2."""


class BadRow(UserError):
    """A row that cannot be used.

    file: the file's name as the user gave it; place: "line 3" or "row 5"; field: the key that is wrong;
    wanted, got: both as short text. All five are attributes, and together the message.
    """

    def __init__(self, file: object, place: str, field: str, wanted: str, got: Any) -> None:
        self.file, self.place, self.field, self.wanted = str(file), place, field, wanted
        self.got = shorten(got if isinstance(got, str) and got.strip() else repr(got))
        super().__init__(f"{self.where}: {self.reason}")

    @property
    def where(self) -> str:
        return f"{self.file} {self.place}"

    @property
    def reason(self) -> str:
        return f"{self.field}: wanted {self.wanted}, got {self.got}"


def shorten(text: str, longest: int = 120) -> str:
    """One line of at most `longest` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 3] + "..."


def visible(text: str) -> str:
    """Text for a terminal: what would steer it, or turn the direction of reading, as escapes."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
