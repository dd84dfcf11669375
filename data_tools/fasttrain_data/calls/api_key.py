"""API keys from the environment, in the one form in which they can be sent and found again."""

from __future__ import annotations

import os

from fasttrain_data.errors import UserError


def key_from_environment(*variables: str) -> str | None:
    """The key in the first of `variables` that holds one, without white space around it.

    A header takes printable ASCII only. What refuses another key names it in an escaped form, in which it could not
    be blotted out of messages; a file with Windows line ends leaves such a key behind.
    """
    for variable in variables:
        if key := os.environ.get(variable, "").strip():
            if not all(" " <= character <= "~" for character in key):
                raise UserError(
                    f"the environment variable {variable}: wanted an API key of printable ASCII characters, "
                    "got one with others"
                )
            return key
    return None
