"""completions.jsonl as prompts: the completions of one question together, wherever they stand in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fasttrain_data.errors import BadRow
from fasttrain_data.ids import content_hash
from fasttrain_data.image_files import ImageFile, as_sent, find_image, read_image
from fasttrain_data.jsonl import LineFile, read_lines
from fasttrain_data.records import Completion, Turn, parse_record
from fasttrain_data.spill import Groups


@dataclass(frozen=True)
class Prompt:
    """One question with its different completions in file order; equal texts are one with their counts added."""

    question_id: str
    images: tuple[str, ...]
    history: tuple[Turn, ...]
    question: str
    completions: tuple[Completion, ...]


class Prompts:
    """Iterates over the prompts of a completions file in the order of their first rows; memory stays flat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._groups = Groups()
        for offset, place, row in read_lines(path):
            completion = parse_record(Completion, row, path, place)
            self._groups.add(content_hash(completion.question_id, completion.prompt_key()), offset)
        if not len(self._groups):
            raise BadRow(path, "line 1", "row", "at least one completion", "an empty file")

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Prompt]:
        with LineFile(self.path) as file:
            for offsets in self._groups:
                rows = [parse_record(Completion, file.row_at(at), self.path, f"byte {at}") for at in offsets]
                first = rows[0]
                yield Prompt(
                    first.question_id,
                    tuple(first.images),
                    tuple(first.history),
                    first.question,
                    tuple(_merge_equal(rows)),
                )

    def close(self) -> None:
        self._groups.close()


def _merge_equal(rows: list[Completion]) -> list[Completion]:
    merged: dict[str, Completion] = {}
    for row in rows:
        if row.text in merged:
            first = merged[row.text]
            merged[row.text] = first.model_copy(update={"count": first.count + row.count})
        else:
            merged[row.text] = row
    return list(merged.values())


class ImageReader:
    """Reads a prompt's images; the last few are kept, for questions about one image stand together."""

    def __init__(self, root: Path, keep: int = 16) -> None:
        self.root, self.keep = root, keep
        self._cache: dict[str, ImageFile] = {}

    def __call__(self, names: tuple[str, ...]) -> tuple[ImageFile, ...]:
        """BadImage names the first image that cannot be used."""
        return tuple(self._read(name) for name in names)

    def _read(self, name: str) -> ImageFile:
        if name not in self._cache:
            image = as_sent(read_image(find_image(self.root, name)))
            while len(self._cache) >= self.keep:
                self._cache.pop(next(iter(self._cache)))
            self._cache[name] = image
        return self._cache[name]
