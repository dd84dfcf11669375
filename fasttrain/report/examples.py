"""A few pairs of a run, as HTML: the images, the prompt, what was chosen and what was rejected."""

from __future__ import annotations

import html
import io
import random
from pathlib import Path
from typing import Any

from fasttrain.errors import UserError
from fasttrain.pages import paragraph, picture
from fasttrain.report.runs import Run

_LONGEST = 1500  # characters of one text
_SIDE = 320  # pixels of a thumbnail


def example_parts(run: Run, count: int, seed: int = 0) -> list[str]:
    """HTML of up to `count` pairs spread over the training files; a sentence instead when they cannot be read."""
    from fasttrain.data.groups import PairFiles
    from fasttrain.data.pairs import read_example, read_pair
    from fasttrain.data.sources import BadRow

    paths = run.config.get("data.train")
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths:
        return [paragraph("The recipe names no pair file.", "note")]
    try:
        read = read_example if run.unit == "examples" else read_pair
        files = PairFiles([str(path) for path in paths], run.config.get("data.image_root"), read)
        numbers = random.Random(seed).sample(range(len(files)), min(len(files), 4 * count))
    except (UserError, OSError) as error:
        return [paragraph(f"No examples: {error}", "note")]
    parts: list[str] = []
    for number in numbers:
        if len(parts) == count:
            break
        try:
            parts.append(_pair(files.pair(number)))
        except BadRow:
            continue
    return parts


def _pair(pair: Any) -> str:
    images = "".join(_thumbnail(ref) for ref in pair.images[:4])
    texts = "".join(
        f'<div class="label">{html.escape(role)}</div>'
        f'<div class="text">{html.escape(_cut("".join(text for kind, text in parts if kind == "text")))}</div>'
        for role, parts in pair.messages
    )
    texts += _answer("chosen", pair.chosen)
    if pair.rejected is not None:
        texts += _answer("rejected", pair.rejected)
    where = html.escape(f"{pair.id} ({_short_place(pair.where)})")
    return f'<div class="pair"><div>{images}</div><div><div class="label">{where}</div>{texts}</div></div>'


def _answer(kind: str, text: str) -> str:
    length = f"{kind}, {len(text):,} characters"
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
