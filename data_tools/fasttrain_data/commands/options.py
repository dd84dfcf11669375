"""Option types that several commands share."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click


class UserPath(click.Path):
    """A path whose leading ~ is the home folder: shells leave it as it is in `--image-root=~/data`."""

    def __init__(self, **checks: bool) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 (Path's own raises)


EXISTING_FILE = UserPath(exists=True, dir_okay=False)
ANY_PATH = UserPath()

output_option = click.option("-o", "--out", "output", type=ANY_PATH, required=True, help="File to write.")
image_root_option = click.option(
    "--image-root",
    type=UserPath(file_okay=False),
    help="Folder that relative image paths start from. Default: the folder of the file that names them.",
)


class Number(click.FloatRange):
    """A finite number in a range: nan is in every range, and as a cap or a pace it is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not math.isfinite(click.FLOAT.convert(value, param, ctx)):
            self.fail(f"wanted a finite number, got {value}", param, ctx)
        return super().convert(value, param, ctx)


SECONDS = Number(0, 1_000_000, min_open=True)  # the longest a socket waits is 24 days


class RowRange(click.ParamType):
    """`FIRST:END`, rows counted from 0, END not included."""

    name = "FIRST:END"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        first, colon, end = str(value).partition(":")
        if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end)):
            self.fail(f"wanted FIRST:END with FIRST < END, got {value!r}", param, ctx)
        return int(first), int(end)
