"""Option types that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)

output_option = click.option("-o", "--out", "output", type=ANY_PATH, required=True, help="File to write.")
image_root_option = click.option(
    "--image-root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that relative image paths start from. Default: the folder of the file that names them.",
)


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
