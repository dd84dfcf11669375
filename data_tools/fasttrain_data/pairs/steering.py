"""SteerLM's conditioning: the text that tells the model which attribute values its answer should have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.image_files import ImageNames
from fasttrain_data.jsonl import check_output, read_rows, whole_rows
from fasttrain_data.records import ATTRIBUTES

# arXiv 2402.10884's own wording, appended to the human turn in training and when the model is asked.
_REQUEST = "\nPlease answer the question such that your response is in the following attributes in 5-point Likert scale:\n"
BEST = (4, 4, 4, 4, 4)


def steering_text(scores: Sequence[int] = BEST) -> str:
    """What is appended to a question; `scores` are 0 to 4, in the order of ATTRIBUTES. ValueError for others.

    The paper asks its trained model for fours throughout; a variant of it sets complexity and verbosity to 2.
    """
    if len(scores) != len(ATTRIBUTES) or any(score not in range(5) for score in scores):
        raise ValueError(f"scores: wanted {len(ATTRIBUTES)} whole numbers from 0 to 4, got {tuple(scores)}")
    values = ",".join(f"{name.capitalize()}:{score}" for name, score in zip(ATTRIBUTES, scores, strict=True))
    return _REQUEST + values


def write_steered(
    questions: Path, output: Path, text: str, image_root: Path | None = None
) -> tuple[int, str | None]:
    """The question file with `text` behind every question; how many there were, and what to tell about image names.

    BadRow names a row that asks nothing; UserError if there is none at all.
    """
    check_output(output, questions)
    names = ImageNames.between(questions, output, image_root)
    count = 0
    with whole_rows(output) as write:
        for place, row in read_rows(questions):
            key = next((key for key in ("text", "question", "prompt") if isinstance(row.get(key), str)), None)
            if key is None:
                raise BadRow(questions, place, "question", "text, question or prompt as text", "nothing")
            write(
                {name: _renamed(name, value, names) for name, value in row.items()} | {key: row[key] + text}
            )
            count += 1
        if not count:  # inside: an output without a question does not appear
            raise UserError(f"{questions}: wanted at least one question, got none")
    return count, names.note(output)


def _renamed(key: str, value: Any, names: ImageNames) -> Any:
    """Image names as the output says them."""
    if key == "image" and isinstance(value, str):
        return names.written(value)
    if key == "images" and isinstance(value, list):
        return [names.written(name) if isinstance(name, str) else name for name in value]
    return value
