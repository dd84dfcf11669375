"""Seeded sampling: items in the order of a seeded hash, the smallest of them or all, and shares of strata."""

from __future__ import annotations

import heapq
import pickle
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from fasttrain_data.ids import content_hash
from fasttrain_data.spill import Spill

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


class Shuffled(Spill):
    """Any number of items, kept on disk, to be drawn from each stratum in the order of a seeded hash of their keys.

    How far a stratum will be drawn from need not be known before: a sample is the first ones that are good.
    """

    def __init__(self, seed: int) -> None:
        super().__init__("CREATE TABLE items (stratum INTEGER, hash BLOB, item BLOB)")
        self.seed = seed
        self.sizes: dict[str, int] = {}
        self._numbers: dict[str, int] = {}  # of strata: SQLite takes no name that is not Unicode

    def add(self, stratum: str, key: str, item: Any) -> None:
        self.sizes[stratum] = self.sizes.get(stratum, 0) + 1
        number = self._numbers.setdefault(stratum, len(self._numbers))
        entry = (number, bytes.fromhex(content_hash(self.seed, key)), pickle.dumps(item))
        self.database.execute("INSERT INTO items VALUES (?, ?, ?)", entry)

    def draw(self, stratum: str) -> Iterator[Any]:
        """Its items, smallest hash first; of equal ones the earlier first. To be called when all items are there."""
        self.database.execute("CREATE INDEX IF NOT EXISTS drawn ON items (stratum, hash)")
        drawn = "SELECT item FROM items WHERE stratum = ? ORDER BY hash, rowid"
        rows = self.database.execute(drawn, (self._numbers[stratum],))
        return (pickle.loads(item) for (item,) in rows)


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
