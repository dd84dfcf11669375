"""Evaluation files: what training must not hold, in the forms of question sources and of the benchmarks' own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fasttrain_data.errors import UserError
from fasttrain_data.ids import image_hash
from fasttrain_data.image_files import data_url_bytes
from fasttrain_data.jsonl import Row, read_rows
from fasttrain_data.questions.readers import READERS, Unusable, detect_source, format_of_row, photo
from fasttrain_data.unread import unread_image


@dataclass(frozen=True)
class Asked:
    """One evaluation question: names of its images, hashes of those that its row holds, its text ("" if it has none).

    unread: why its image, or all of it, is not known.
    """

    names: list[str]
    question: str
    digests: tuple[str, ...] = ()
    unread: str = ""


def read_evaluation(path: Path) -> Iterator[Asked]:
    """Every question of an evaluation file; of rows that cannot be asked the images alone."""
    if path.suffix == ".tsv":
        yield from _mmbench(path)
        return
    first = None
    for place, row in _rows(path):
        first = first or detect_source(row)
        try:
            for draft in READERS[format_of_row(path, place, row, first)](row, place, None):
                key = None if draft.images else unread_image(row)
                yield Asked(draft.images, draft.question, unread=f"{key} is not read" if key else "")
        except Unusable as problem:
            images = _named(row)
            inline = [content for content in map(data_url_bytes, images) if content is not None]
            names = [name for name in images if not name.startswith("data:")]
            digests = tuple(map(image_hash, inline))
            whole = len(names) + len(digests) == len(images) > 0
            yield Asked(names, "", digests, unread="" if whole else str(problem))


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows as question sources have them: MM-Vet's key of images is renamed."""
    of_mm_vet = _mm_vet(path)
    for place, row in read_rows(path) if of_mm_vet is None else of_mm_vet.items():
        if row.get("imagename") is not None:
            row = {**row, "image": row["imagename"]}
        yield place, row


def _mm_vet(path: Path) -> dict[str, Row] | None:
    """The rows of MM-Vet's file, which is one object; None for any other file."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig")) if path.suffix == ".json" else None
    except (OSError, ValueError, RecursionError):
        return None  # several objects, or what read_rows names
    values = list(rows.values()) if isinstance(rows, dict) else []
    return rows if values and all(isinstance(row, dict) and "imagename" in row for row in values) else None


def _mmbench(path: Path) -> Iterator[Asked]:
    """The images of MMBench's table, which are in it."""
    import fasttrain.errors
    from fasttrain.evaluate.mmbench_file import read_rows as read_table  # needs no torch

    try:
        rows = read_table(path)
    except fasttrain.errors.UserError as error:
        raise UserError(str(error)) from None
    for row in rows:
        assert row.image is not None
        yield Asked([], row.question, (image_hash(row.image.read()),))


def _named(row: Row) -> list[str]:
    """Names of images wherever a format has them."""
    images = row.get("images")
    names = [row.get("image_file"), row.get("image"), *(images if isinstance(images, list) else [])]
    if row.get("image_id") is not None:
        names.append(photo(row["image_id"]))
    return [name for name in names if isinstance(name, str)]
