"""What is reviewed: a seeded sample of pairs, shown without telling which answer is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fasttrain_data.errors import UserError
from fasttrain_data.formats import read_pairs
from fasttrain_data.formats.messages import text_of
from fasttrain_data.ids import content_hash, rng_of
from fasttrain_data.jsonl import Row, finite_number
from fasttrain_data.questions.sample import BottomK
from fasttrain_data.records import ATTRIBUTES
from fasttrain_data.spill import KeyCounts

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Item:
    """One pair, chosen and rejected as the annotator has them: labels that `pair --flip` swapped are swapped back.

    differences: chosen minus rejected score of each attribute that the annotator gave.
    """

    id: str
    messages: list[tuple[str, str]]
    images: list[Any]
    chosen: str
    rejected: str
    margin: float | None
    differences: dict[str, int] = field(default_factory=dict)

    def chosen_side(self, seed: int, rater: str) -> Side:
        """Where a reviewer sees the chosen answer: at random for each of them, and the same whenever asked."""
        return "left" if rng_of("side", seed, rater, self.id).random() < 0.5 else "right"


def sample_items(pairs: Path, limit: int, seed: int) -> list[Item]:
    """At most `limit` pairs of the file, drawn and ordered by seed; UserError if there is none.

    Pairs that share an id are all there: the second one's is `id#2`, and so on in file order.
    """
    heap: BottomK[tuple[str, Row]] = BottomK(limit, seed)
    counts = KeyCounts()
    for row in read_pairs(pairs):
        own = str(row["id"])
        while (times := counts.add(content_hash(own))) > 1:
            own = f"{row['id']}#{times}"
        heap.offer(own, (own, row))
    counts.close()
    items = [_item(own, row) for own, row in heap.ordered()]
    if not items:
        raise UserError(f"{pairs}: wanted at least one pair, got none")
    return items


def _item(own: str, row: Row) -> Item:
    texts = []
    for turn in row["prompt"]:
        parts = turn["content"]
        texts.append((turn["role"], "".join(part["text"] for part in parts if part["type"] == "text")))
    chosen, rejected, margin = "chosen", "rejected", finite_number(row.get("margin"))
    if row.get("flipped") is True:
        chosen, rejected, margin = rejected, chosen, None if margin is None else -margin
    return Item(
        id=own,
        messages=texts,
        images=row["images"],
        chosen=text_of(row[chosen][0]),
        rejected=text_of(row[rejected][0]),
        margin=margin,
        differences=_differences(row.get(f"scores_{chosen}"), row.get(f"scores_{rejected}")),
    )


def _differences(chosen: Any, rejected: Any) -> dict[str, int]:
    if not (isinstance(chosen, dict) and isinstance(rejected, dict)):
        return {}
    both = [
        name
        for name in ATTRIBUTES
        if all(
            isinstance(side.get(name), int) and not isinstance(side[name], bool)
            for side in (chosen, rejected)
        )
    ]
    return {name: chosen[name] - rejected[name] for name in both}
