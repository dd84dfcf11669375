"""Reviews in Argilla's record format, out and in: what `dataset.records.to_json` writes and `from_json` reads (Argilla 2).

A record has the fields `prompt`, `left`, `right` and images as data URIs, and answers to the question `preference`: left, right or
tie. Which answer is chosen stands nowhere in it; reading it back takes the sides from the pair file.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.image_files import BadImage, mime_type
from fasttrain_data.jsonl import Row, check_output, read_rows, write_text
from fasttrain_data.review.images import image_bytes
from fasttrain_data.review.items import Item
from fasttrain_data.review.session import Review

QUESTION = "preference"
_OTHER = {"left": "right", "right": "left", "tie": "tie"}
_SIDES_OF = "argilla"  # all its annotators see a pair's answers on the same sides


def user_id(name: str) -> str:
    """The UUID that stands for a reviewer in Argilla's files."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"fasttrain-review:{name}"))


def export_argilla(review: Review, image_root: Path, output: Path) -> int:
    """Write all pairs of the review with the judgements that stand, skipped ones aside; the number of records."""
    check_output(output, review.pairs)
    judged: dict[str, list[Row]] = {}
    for row in review.judgements.standing():
        judged.setdefault(str(row["id"]), []).append(row)
    records = [_record(review, item, judged.get(item.id, []), image_root) for item in review.items]
    write_text(output, json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    return len(records)


def _record(review: Review, item: Item, rows: list[Row], image_root: Path) -> dict[str, Any]:
    side = item.chosen_side(review.seed, _SIDES_OF)
    answers = {side: item.chosen, _OTHER[side]: item.rejected}
    fields = {
        "prompt": "\n\n".join(f"{role}: {text}" for role, text in item.messages),
        "left": answers["left"],
        "right": answers["right"],
    }
    for number in range(len(item.images)):
        try:
            content = image_bytes(item, number, image_root)
        except BadImage as problem:
            raise UserError(
                f"{review.pairs}: pair {item.id}: images: wanted an image, got {problem}"
            ) from None
        fields[f"image_{number + 1}"] = (
            f"data:{mime_type(content)};base64,{base64.b64encode(content).decode()}"
        )
    given = [row for row in rows if row["verdict"] != "skip"]
    answers_given = []
    for row in given:
        value = row["verdict"] if row["chosen_side"] == side else _OTHER[row["verdict"]]
        answers_given.append({"value": value, "user_id": user_id(str(row["rater"]))})
    return {
        "id": item.id,
        "fields": fields,
        "metadata": {"seed": review.seed, "reviewers": [str(row["rater"]) for row in given]},
        "suggestions": {},
        "responses": {QUESTION: answers_given} if answers_given else {},
        "vectors": {},
    }


def import_argilla(review: Review, source: Path) -> tuple[int, int]:
    """Take over the answers in an Argilla file; (judgements taken, judgements that stood already).

    BadRow for a record of another pair file or seed, or whose answers are not the pair's.
    """
    taken = same = 0
    for place, row in read_rows(source):
        item = _checked_item(review, row, source, place)
        side = item.chosen_side(review.seed, _SIDES_OF)
        for rater, value in _answers(row, source, place):
            own = item.chosen_side(review.seed, rater)
            verdict = value if own == side else _OTHER[value]
            standing = review.judgements.of(rater).get(item.id)
            if standing is not None and standing["verdict"] == verdict:
                same += 1
                continue
            review.judge(rater, item, verdict)  # type: ignore[arg-type]
            taken += 1
    return taken, same


def _checked_item(review: Review, row: Row, source: Path, place: str) -> Item:
    item = review.find(str(row.get("id")))
    if item is None:
        raise BadRow(
            source,
            place,
            "id",
            f"a pair of {review.pairs.name}, with the same --limit and --seed",
            row.get("id"),
        )
    side = item.chosen_side(review.seed, _SIDES_OF)
    fields = row.get("fields")
    if (
        not isinstance(fields, dict)
        or fields.get(side) != item.chosen
        or fields.get(_OTHER[side]) != item.rejected
    ):
        raise BadRow(source, place, "fields", "this pair's answers on the sides of this --seed", "others")
    return item


def _answers(row: Row, source: Path, place: str) -> Iterator[tuple[str, str]]:
    """(reviewer, value) of each response; a reviewer is known by name where the record tells names, else by id."""
    given = row.get("responses") or {}
    if not isinstance(given, dict):
        raise BadRow(source, place, "responses", "an object of lists by question", given)
    responses = given.get(QUESTION) or []
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BadRow(source, place, "metadata", "an object", metadata)
    names = metadata.get("reviewers") or []
    known = {user_id(str(name)): str(name) for name in (names if isinstance(names, list) else [names])}
    for response in responses if isinstance(responses, list) else [responses]:
        value = response.get("value") if isinstance(response, dict) else None
        if not isinstance(value, str) or value not in _OTHER:
            raise BadRow(source, place, f"responses.{QUESTION}", "left, right or tie", value)
        rater = str(response.get("user_id") or "argilla")
        yield known.get(rater, rater), str(value)
