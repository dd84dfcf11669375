"""Data sets of scored candidates: HelpSteer 1 to 3 and VLFeedback, as pairs and as annotation records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from fasttrain_data.errors import BadRow
from fasttrain_data.formats.messages import Place, answer, message, turns_of
from fasttrain_data.formats.table_rows import first_of
from fasttrain_data.ids import content_hash, rng_of
from fasttrain_data.jsonl import Row
from fasttrain_data.pairs.rule import choose
from fasttrain_data.pairs.scores import parse_score
from fasttrain_data.records import ATTRIBUTES

_MARGIN = 2.0


def read_helpsteer(
    rows: Iterable[tuple[str, str, Row]],
    tell: Callable[[str, str], None],
    bad: Callable[[BadRow], object] | None = None,
) -> Iterator[Row]:
    """Pairs of HelpSteer and HelpSteer2 by the paper's rule; answers to one prompt stand together in them."""
    rule = parse_score("hcc")
    for where, group in helpsteer_groups(rows, bad):
        scores = [rule.of(tuple(row[name] for name in ATTRIBUTES)) for row in group]
        identity = content_hash(group[0]["prompt"])
        choices = choose(scores, _MARGIN, "random", rng_of(0, identity))
        if not choices:
            tell(where, "one answer only" if len(group) < 2 else "low margin")
        for choice in choices:
            chosen, rejected = group[choice.chosen], group[choice.rejected]
            yield {
                "id": content_hash(identity, chosen["response"], rejected["response"]),
                "images": [],
                "prompt": [message("user", group[0]["prompt"])],
                "chosen": answer(chosen["response"]),
                "rejected": answer(rejected["response"]),
                "score_chosen": choice.score_chosen,
                "score_rejected": choice.score_rejected,
                "scores_chosen": {name: chosen[name] for name in ATTRIBUTES},
                "scores_rejected": {name: rejected[name] for name in ATTRIBUTES},
            }


def helpsteer_groups(
    rows: Iterable[tuple[str, str, Row]], bad: Callable[[BadRow], object] | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """(where, checked rows) of each run of rows with the same prompt; a wrong row goes to `bad`, if that is given."""
    for _, members in groupby(rows, key=lambda item: item[2].get("prompt")):
        where, group = "", []
        for file, name, row in members:
            try:
                group.append(_checked(row, Place(file, name)))
                where = where or f"{file} {name}"
            except BadRow as error:
                if bad is None:
                    raise
                bad(error)
        if group:
            yield where, group


def _checked(row: Row, place: Place) -> Row:
    for key in ("prompt", "response"):
        place.text(row.get(key), key)
    for attribute in ATTRIBUTES:
        value = row.get(attribute)
        if not isinstance(value, int | float) or value not in (0, 1, 2, 3, 4):
            raise place.bad(attribute, "a whole number from 0 to 4", value)
    return row


def helpsteer_annotations(rows: Iterable[tuple[str, str, Row]]) -> Iterator[Row]:
    """The same groups as annotation records, from which pairs can be made by any rule."""
    for _, group in helpsteer_groups(rows):
        prompt = group[0]["prompt"]
        completions = [
            {
                "id": content_hash(prompt, row["response"]),
                "text": row["response"],
                **{name: int(row[name]) for name in ATTRIBUTES},
            }
            for row in group
        ]
        yield {
            "id": content_hash(prompt, [row["response"] for row in group]),
            "question_id": content_hash(prompt),
            "images": [],
            "question": prompt,
            "completions": completions,
            "status": "ok",
            "model": "human (HelpSteer)",
        }


def read_helpsteer3(row: Row, place: Place) -> Row | str:
    """A negative overall preference means that the first response is better."""
    preference = row.get("overall_preference")
    if not isinstance(preference, int | float) or not -3 <= preference <= 3:
        raise place.bad("overall_preference", "a number from -3 to 3", preference)
    if preference == 0:
        return "tie"
    first, second = (place.text(row.get(key), key) for key in ("response1", "response2"))
    turns = turns_of(row.get("context"), "context", place)
    taken = ("context", "response1", "response2")
    return {
        **{key: value for key, value in row.items() if key not in taken},
        "images": None,
        "prompt": [message(role, text) for role, text in turns],
        "chosen": first if preference < 0 else second,
        "rejected": second if preference < 0 else first,
    }


def read_vlfeedback(row: Row, place: Place) -> Row | str:
    """Best against worst mean of the ratings; a candidate without any rating takes no part."""
    candidates = [(_mean_rating(item, place), item) for item in _completions(row.get("completions"), place)]
    rated = [(mean, item) for mean, item in candidates if mean is not None]
    if len(rated) < 2:
        return "one rated answer only"
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        return "tie"
    return {
        **{
            key: value
            for key, value in row.items()
            if key not in ("prompt", "completions", "image", "models")
        },
        "images": first_of(row, "image", "img_path"),
        "prompt": [message("user", place.text(row.get("prompt"), "prompt"))],
        "chosen": place.text(best[1].get("response"), "completions.response"),
        "rejected": place.text(worst[1].get("response"), "completions.response"),
        "score_chosen": best[0],
        "score_rejected": worst[0],
        "chosen_model": best[1].get("model"),
        "rejected_model": worst[1].get("model"),
    }


def _completions(value: Any, place: Place) -> list[Row]:
    """A list of objects, or (as `datasets` stores a sequence of structs) an object of lists."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, cells)) for cells in zip(*value.values())]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise place.bad("completions", "a list of answers with annotations", value)


def _mean_rating(item: Row, place: Place) -> float | None:
    ratings = []
    aspects = item.get("annotations") or {}
    if not isinstance(aspects, dict) or not all(
        isinstance(aspect, dict | None) for aspect in aspects.values()
    ):
        raise place.bad("completions.annotations", "ratings by aspect", aspects)
    for aspect in aspects.values():
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", str((aspect or {}).get("Rating", "")))
        if match:
            ratings.append(float(match[1]))
    return sum(ratings) / len(ratings) if ratings else None
