"""Seeded stratified sampling in one pass: the k smallest of a seeded hash, per stratum."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from fasttrain_data.ids import content_hash

Item = TypeVar("Item")


class BottomK(Generic[Item]):
    """Keeps the items whose seeded hash is smallest.

    Which items that are depends on the seed and the items' keys, not on their order, so a file that grows at
    its end or is shuffled changes as little as it must.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._heap: list[tuple[int, int, Item]] = []
        self._count = 0
        self.offered = 0

    def offer(self, key: str, item: Item) -> None:
        self.offered += 1
        self._count += 1
        entry = (-int(content_hash(self.seed, key), 16), self._count, item)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def ordered(self) -> list[Item]:
        """The kept items, smallest hash first."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: -entry[0])]


def share_out(total: int, available: dict[str, int]) -> dict[str, int]:
    """Split `total` evenly over strata; what a short stratum cannot give goes to the others.

    A remainder goes to the strata that come first.
    """
    shares = dict.fromkeys(available, 0)
    open_strata = [name for name, count in available.items() if count]
    left = min(total, sum(available.values()))
    while left:
        each = max(1, left // len(open_strata))
        for name in open_strata[: left // each]:
            give = min(each, available[name] - shares[name])
            shares[name] += give
            left -= give
        open_strata = [name for name in open_strata if shares[name] < available[name]]
    return shares
