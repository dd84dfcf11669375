"""A few pairs of a run, as HTML: the images, the prompt, what was chosen and what was rejected."""

from __future__ import annotations

import contextlib
import functools
import html
import io
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.errors import UserError
from fasttrain.files import HashMemo, cache_root
from fasttrain.pages import paragraph, picture
from fasttrain.report.runs import Run

if TYPE_CHECKING:
    from fasttrain.data.groups import GroupIndex

_LONGEST = 1500  # characters of one text
_SIDE = 320  # pixels of a thumbnail
_REACH = 100_000  # rows that are looked through for a prompt's other pairs


class PairReader:
    """The rows that a run was trained on, by number; UserError if its files cannot be read."""

    def __init__(self, run: Run) -> None:
        from fasttrain.data.groups import PairFiles
        from fasttrain.data.pairs import read_example, read_pair

        paths = run.config.get("data.train")
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not paths:
            raise UserError("the recipe names no pair file")
        read = read_example if run.unit == "examples" else read_pair
        self._left_out = run.left_out
        self._by_image = run.config.get("data.group_by") == "image"
        root = run.config.get("data.image_root")
        self._files = PairFiles([str(path) for path in paths], None if root is None else str(root), read)

    def __len__(self) -> int:
        return len(self._files)

    def pair(self, number: int) -> tuple[Any, str]:
        """A pair, or None and why there is none."""
        from fasttrain.data.bad_row import BadRow

        if number >= len(self):
            return None, "is not in the file any more"
        try:
            return self._files.pair(number), ""
        except BadRow as error:
            return None, str(error)

    def pair_of_prompt(self, first: int, place: int) -> tuple[Any, str]:
        """A group's pair by its place among those that were trained on; `first` is the group's first row."""
        prompt, problem = self.pair(first)
        if prompt is None:
            return None, problem
        for number in self._group(first, prompt):
            pair, _ = self.pair(number)
            if pair is None or pair.where in self._left_out:
                continue
            if not place:
                return pair, ""
            place -= 1
        if self._by_image:
            return None, "is not in the file any more"
        return None, f"was not found in the {_REACH:,} rows from there on"

    def _group(self, first: int, prompt: Any) -> Iterable[int]:
        """The rows of a group, perhaps with others that are left out."""
        if not self._by_image:
            near = range(first, min(len(self), first + _REACH))
            return (number for number in near if _same_prompt(self.pair(number)[0], prompt))
        rows, starts = self._groups.rows, self._groups.starts
        places = (rows == first).nonzero()[0]
        return [int(row) for at in places for row in self._groups.group(int((starts <= at).sum()) - 1)]

    @functools.cached_property
    def _groups(self) -> GroupIndex:
        """The groups as training makes them: which questions about an image are together depends on all rows before them."""
        from fasttrain.data.row_index import group_rows, read_rows

        with contextlib.closing(HashMemo(cache_root() / "hashes.sqlite")) as memo:
            tables = read_rows(self._files, None, by_image=True)
            return group_rows(self._files, memo, lambda error: None, tables=tables)


def _same_prompt(pair: Any, other: Any) -> bool:
    """As rows are grouped for training: equal text, equal image files or equal bytes in them."""
    if pair is None or pair.messages != other.messages or len(pair.images) != len(other.images):
        return False
    try:
        return pair.images == other.images or all(
            a.read() == b.read() for a, b in zip(pair.images, other.images)
        )
    except (OSError, ValueError):
        return False


def example_parts(run: Run, count: int, seed: int = 0) -> list[str]:
    """HTML of up to `count` pairs spread over the training files; a sentence instead when they cannot be read."""
    try:
        reader = PairReader(run)
        numbers = random.Random(seed).sample(range(len(reader)), min(len(reader), 4 * count))
    except (UserError, OSError) as error:
        return [paragraph(f"No examples: {error}", "note")]
    parts: list[str] = []
    for number in numbers:
        if len(parts) == count:
            break
        pair, _ = reader.pair(number)
        if pair is not None:
            parts.append(pair_html(pair))
    return parts or [paragraph("No row of the file can be shown.", "note")]


def pair_html(pair: Any, lead: str = "", told: dict[str, str] | None = None) -> str:
    """A card; `lead` stands first, `told` says more of the chosen and the rejected answer."""
    told = told or {}
    images = "".join(_thumbnail(ref) for ref in pair.images[:4])
    texts = _said(pair.messages) + _answer("chosen", pair.chosen, told.get("chosen", ""))
    texts += "".join(_said(asked) + _answer("chosen", answer, "") for asked, answer in pair.later)
    if pair.rejected is not None:
        texts += _answer("rejected", pair.rejected, told.get("rejected", ""))
    where = html.escape(_short_place(pair.where) + ("" if pair.id == pair.where else f", id {pair.id}"))
    first = f'<div class="lead">{html.escape(lead)}</div>' if lead else ""
    return (
        f'<div class="pair">{f"<div>{images}</div>" if images else ""}'
        f'<div>{first}{texts}<div class="label">{where}</div></div></div>'
    )


def _said(messages: Iterable[Any]) -> str:
    return "".join(
        f'<div class="label">{html.escape(role)}</div>'
        f'<div class="text">{html.escape(_cut("".join(text for kind, text in parts if kind == "text")))}</div>'
        for role, parts in messages
    )


def _answer(kind: str, text: str, more: str) -> str:
    length = f"{kind}, {len(text):,} characters" + (f", {more}" if more else "")
    return f'<div class="{kind}"><div class="label">{length}</div><div class="text">{html.escape(_cut(text))}</div></div>'


def _thumbnail(ref: Any) -> str:
    """A small JPEG of an image; a sentence if it cannot be opened."""
    from fasttrain.data.images import open_image

    try:
        image = open_image(ref.read()).convert("RGB")
    except (OSError, ValueError) as error:
        return paragraph(f"{Path(ref.name()).name}: {error}", "note")
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return picture(buffer.getvalue(), Path(ref.name()).name, "image/jpeg")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"


def _short_place(where: str) -> str:
    path, space, place = where.partition(" ")
    return f"{Path(path).name}{space}{place}"
