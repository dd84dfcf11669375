"""A blind review by several people: what each sees next, what they judged, how far it agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttrain_data.errors import UserError
from fasttrain_data.review.agreement import agreement
from fasttrain_data.review.items import Item, sample_items
from fasttrain_data.review.judgements import Judgements, Verdict, reviews_path

MAX_NAME = 60


class Review:
    """One sample of pairs for all reviewers of a file; each has a queue, sides and an undo of their own."""

    def __init__(self, pairs: Path, limit: int, seed: int) -> None:
        self.pairs, self.seed = pairs, seed
        self.items = sample_items(pairs, limit, seed)
        self._by_id = {item.id: item for item in self.items}
        self.judgements = Judgements(reviews_path(pairs))

    def find(self, item_id: str) -> Item | None:
        return self._by_id.get(item_id)

    def open(self, rater: str) -> list[Item]:
        """What a reviewer has not judged yet, in the order of the sample."""
        judged = self.judgements.of(rater)
        return [item for item in self.items if item.id not in judged]

    def judge(self, rater: str, item: Item, verdict: Verdict) -> None:
        """Keep a judgement; it is on disk when this returns. Judging a pair again replaces it."""
        side = item.chosen_side(self.seed, rater)
        self.judgements.append(
            {
                "id": item.id,
                "rater": rater,
                "verdict": verdict,
                "chosen_side": side,
                "agrees": verdict == side if verdict in ("left", "right") else None,
                "margin": item.margin,
                "differences": item.differences,
            }
        )

    def undo(self, rater: str) -> Item | None:
        """Take back a reviewer's newest judgement of this sample; the pair, or None if there is none."""
        own = [item_id for item_id in self.judgements.of(rater) if item_id in self._by_id]
        if not own:
            return None
        self.judgements.append({"id": own[-1], "rater": rater, "undone": True})
        return self._by_id[own[-1]]

    def shown(self, rater: str) -> dict[str, Any]:
        """What a reviewer's page gets: the next pair without scores and sides, and how far they are."""
        waiting = self.open(rater)
        done = len(self.items) - len(waiting)
        shown: dict[str, Any] = {"rater": rater, "done": done, "total": len(self.items), "item": None}
        if waiting:
            item = waiting[0]
            left_first = item.chosen_side(self.seed, rater) == "left"
            answers = (item.chosen, item.rejected) if left_first else (item.rejected, item.chosen)
            shown["item"] = {
                "id": item.id,
                "messages": item.messages,
                "images": len(item.images),
                "left": answers[0],
                "right": answers[1],
            }
        return shown

    def agreement(self) -> dict[str, Any]:
        return agreement(self.judgements.standing())


def check_name(name: object) -> str:
    """A reviewer's name as it is kept; UserError if it is none."""
    text = " ".join(str(name).split())
    if not isinstance(name, str) or not text or len(text) > MAX_NAME or not text.isprintable():
        raise UserError(f"reviewer's name: wanted 1 to {MAX_NAME} printable characters, got {name!r}")
    return text
