"""A row of a pair file that cannot be used."""

from __future__ import annotations

from typing import Any

from fasttrain.errors import UserError


class BadRow(UserError):
    """A row that cannot be used: file, place in it, field, what was wanted and what came."""

    def __init__(self, where: str, field: str, wanted: str, got: Any) -> None:
        text = got if isinstance(got, str) and got.strip() else repr(got)
        self.where, self.reason = where, printable(f"{field}: wanted {wanted}, got {text[:120]}")
        super().__init__(f"{where}: {self.reason}")

    @classmethod
    def told(cls, where: str, reason: str) -> BadRow:
        """One that was found earlier, or in another process, from its two texts."""
        error = cls(where, "", "", "")
        error.args, error.reason = (f"{where}: {reason}",), reason
        return error


def printable(text: str) -> str:
    """The text with lone surrogates escaped: JSON can hold them, UTF-8 files and terminals cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
