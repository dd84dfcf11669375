"""The files 0, 1 and 2 of a command."""

from __future__ import annotations

import os
import sys


def open_standard_files() -> None:
    """Closed ones as /dev/null: the next files that are opened would take their places, and get what C libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
