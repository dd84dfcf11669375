"""A blind review: which pairs, in which order and on which side, what was judged, how far it agrees."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fasttrain_data.errors import UserError
from fasttrain_data.formats import read_pairs
from fasttrain_data.formats.messages import text_of
from fasttrain_data.ids import rng_of
from fasttrain_data.jsonl import Row, dump_row, read_rows
from fasttrain_data.questions.sample import BottomK
from fasttrain_data.records import now

Verdict = Literal["left", "right", "tie", "skip"]
VERDICTS: tuple[Verdict, ...] = ("left", "right", "tie", "skip")


@dataclass(frozen=True)
class Item:
    """One pair as the reviewer sees it: nothing in it tells which answer is chosen, except `chosen_left`."""

    id: str
    messages: list[tuple[str, str]]
    images: list[Any]
    left: str
    right: str
    chosen_left: bool
    margin: float | None


class Session:
    """A seeded sample of pairs and the judgements made of them, one JSON line each beside the pair file."""

    def __init__(self, pairs: Path, limit: int, seed: int, rater: str) -> None:
        self.pairs, self.rater = pairs, rater
        self.path = reviews_path(pairs)
        heap: BottomK[Row] = BottomK(limit, seed)
        for row in read_pairs(pairs):
            heap.offer(str(row["id"]), row)
        self.items = [_item(row, seed) for row in heap.ordered()]
        if not self.items:
            raise UserError(f"{pairs}: wanted at least one pair, got none")
        judged = {row["id"] for row in self._own_rows()}
        self.open = [item for item in self.items if item.id not in judged]

    def judge(self, item: Item, verdict: Verdict) -> None:
        """Append one judgement; it is on disk when this returns."""
        agrees = {"left": item.chosen_left, "right": not item.chosen_left}.get(verdict)
        row = {
            "id": item.id,
            "rater": self.rater,
            "verdict": verdict,
            "chosen_side": "left" if item.chosen_left else "right",
            "agrees": agrees,
            "margin": item.margin,
            "created": now(),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(dump_row(row) + "\n")
        self.open = [other for other in self.open if other.id != item.id]

    def _own_rows(self) -> Iterator[Row]:
        if self.path.exists():
            yield from (row for _, row in read_rows(self.path) if row.get("rater") == self.rater)


def reviews_path(pairs: Path) -> Path:
    return pairs.with_name(f"{pairs.stem}.reviews.jsonl")


def _item(row: Row, seed: int) -> Item:
    chosen, rejected = text_of(row["chosen"][0]), text_of(row["rejected"][0])
    chosen_left = rng_of("side", seed, str(row["id"])).random() < 0.5
    texts = []
    for turn in row["prompt"]:
        parts = turn["content"]
        texts.append((turn["role"], "".join(part["text"] for part in parts if part["type"] == "text")))
    margin = row.get("margin")
    return Item(
        id=str(row["id"]),
        messages=texts,
        images=row["images"],
        left=chosen if chosen_left else rejected,
        right=rejected if chosen_left else chosen,
        chosen_left=chosen_left,
        margin=float(margin) if isinstance(margin, int | float) else None,
    )


def agreement_lines(pairs: Path) -> Iterator[str]:
    """How often reviewers preferred the chosen answer, overall, by rater and by margin."""
    path = reviews_path(pairs)
    if not path.exists():
        raise UserError(f"{path}: wanted reviews, got none; run the review first")
    rows = [row for _, row in read_rows(path)]
    yield f"{len(rows):,} judgements in {path}"
    yield f"all: {_share(rows)}"
    for rater in sorted({str(row.get("rater")) for row in rows}):
        yield f"  rater {rater}: {_share([row for row in rows if str(row.get('rater')) == rater])}"
    for margin in sorted({row["margin"] for row in rows if row.get("margin") is not None}):
        yield f"  margin {margin:g}: {_share([row for row in rows if row.get('margin') == margin])}"
    left = [row for row in rows if row["verdict"] in ("left", "right")]
    if left:
        share = sum(row["verdict"] == "left" for row in left) / len(left)
        yield f"the left side was preferred in {share:.1%} of {len(left):,}: far from half means a careless review"


def _share(rows: list[Row]) -> str:
    decided = [row for row in rows if row.get("agrees") is not None]
    ties = sum(row["verdict"] == "tie" for row in rows)
    if not decided:
        return f"no preference, {ties} ties"
    agree, count = sum(bool(row["agrees"]) for row in decided), len(decided)
    low, high = wilson(agree, count)
    return f"{agree} of {count} agree with the annotator ({agree / count:.1%}, 95 % {low:.1%} to {high:.1%}), {ties} ties"


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a share (Wilson, JASA 1927)."""
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def as_json(item: Item, left_over: int) -> str:
    """What the page gets: no scores, no sides."""
    shown = {
        "id": item.id,
        "messages": item.messages,
        "images": len(item.images),
        "left": item.left,
        "right": item.right,
        "left_over": left_over,
    }
    return json.dumps(shown, ensure_ascii=False)
