"""Bin packing: sized items into bins of a budget, for one rank or evenly for several."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_EVEN = 1.001  # fullest rank against the mean: where exchanging items stops
_EXCHANGES = 8  # at most so many for every rank


def first_fit_decreasing(sized: list[tuple[int, T]], budget: int) -> list[list[T]]:
    """Items in bins of at most `budget`: each, largest first, into the first bin that has room.

    An item above the budget has a bin of its own.
    """
    bins: list[tuple[int, list[T]]] = []
    for size, item in sorted(sized, key=lambda entry: -entry[0]):
        for index, (room, items) in enumerate(bins):
            if size <= room:
                items.append(item)
                bins[index] = (room - size, items)
                break
        else:
            bins.append((budget - size, [item]))
    return [items for _, items in bins]


def level(sized: list[tuple[int, T]], count: int, budget: int) -> list[tuple[int, list[T]]] | None:
    """(size, items) of `count` bins as equal as may be: each item, largest first, into the emptiest bin.

    An item above the budget has a bin of its own. None if an item finds no room.
    """
    bins: list[list[T]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    sizes = [0] * count
    for size, item in sorted(sized, key=lambda entry: -entry[0]):
        held, index = heap[0] if heap else (budget + 1, -1)
        if held and held + size > budget:
            return None
        bins[index].append(item)
        sizes[index] = held + size
        heapq.heapreplace(heap, (held + size, index))
    return list(zip(sizes, bins))


def deal(
    sized: list[tuple[int, T]], chains: list[list[tuple[int, T]]], budget: int, ranks: int
) -> list[list[list[T]]]:
    """Rounds of one bin per rank, as few as found, with equal bins in a round and equal sums over a rank's bins.

    The links of a chain are bins of their own, all on one rank, in the first rounds. A bin may be empty.
    """
    held = [0] * ranks  # tokens of each rank
    columns: list[list[_Bin[T]]] = [[] for _ in range(ranks)]
    for chain in sorted(chains, key=lambda chain: -len(chain)):
        rank = min(range(ranks), key=lambda rank: (len(columns[rank]), held[rank]))
        columns[rank] += [_Bin([link], fixed=True) for link in chain]
        held[rank] += sum(size for size, _ in chain)
    taken = sum(map(len, columns))
    items = [(size, (size, item)) for size, item in sized]
    rounds, bins = _fewest_rounds(items, taken, max(map(len, columns)), budget, ranks)
    bins.sort(key=lambda entry: entry[0])
    for depth in range(rounds):  # the largest bins first, each to the rank that holds least
        for rank in sorted(range(ranks), key=lambda rank: held[rank]):
            if len(columns[rank]) == depth:
                size, found = bins.pop()
                columns[rank].append(_Bin(found))
                held[rank] += size
    _even_out(columns, held, budget)
    return [[[item for _, item in column[depth].items] for column in columns] for depth in range(rounds)]


@dataclass
class _Bin(Generic[T]):
    items: list[tuple[int, T]]
    fixed: bool = False  # a link of a chain

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.items)


def _even_out(columns: list[list[_Bin[T]]], held: list[int], budget: int) -> None:
    """Exchange items of one round between the fullest rank and an emptier one while that makes the fullest less full."""
    ranks = range(len(columns))
    for _ in range(_EXCHANGES * len(columns)):
        full = max(ranks, key=lambda rank: held[rank])
        if held[full] * len(columns) <= _EVEN * sum(held):
            return
        for other in sorted(ranks, key=lambda rank: held[rank]):
            given = _exchange(columns[full], columns[other], held[full] - held[other], budget)
            if given:
                held[full] -= given
                held[other] += given
                break
        else:
            return


def _exchange(full: list[_Bin[T]], other: list[_Bin[T]], difference: int, budget: int) -> int:
    """Give one item for a smaller one, or for none, so that the two ranks come as close as can be; the tokens given."""
    best: tuple[int, int, _Bin[T], _Bin[T], int, int] | None = None
    for here, there in zip(full, other, strict=True):
        if here.fixed or there.fixed:
            continue
        room = budget - there.size
        theirs = [(size, index) for index, (size, _) in enumerate(there.items)]
        if len(here.items) > 1:  # a bin that is left empty would be filled with a repeat
            theirs.append((0, -1))
        for mine, (size, _) in enumerate(here.items):
            for smaller, index in theirs:
                given = size - smaller
                if 0 < given < difference and given <= room:
                    apart = abs(
                        here.size - there.size
                    )  # in this round, where ranks that share weights wait too
                    miss = abs(2 * given - difference) + max(
                        0, abs(here.size - there.size - 2 * given) - apart
                    )
                    if best is None or miss < best[0]:
                        best = (miss, given, here, there, mine, index)
    if best is None:
        return 0
    _, given, here, there, mine, index = best
    item = here.items.pop(mine)
    if index >= 0:
        here.items.append(there.items.pop(index))
    there.items.append(item)
    return given


def _fewest_rounds(
    sized: list[tuple[int, T]], taken: int, least: int, budget: int, ranks: int
) -> tuple[int, list[tuple[int, list[T]]]]:
    """The number of rounds, and bins for every place in them that no chain has `taken`."""
    tight = first_fit_decreasing([(size, (size, item)) for size, item in sized], budget)  # few, but uneven
    total = sum(size for size, _ in sized)
    fewest = max(least, -(-(taken + -(-total // budget)) // ranks))
    enough = max(least, -(-(taken + len(tight)) // ranks))
    for rounds in range(fewest, enough + 1):
        found = level(sized, rounds * ranks - taken, budget)
        if found is not None:
            return rounds, found
    empty: list[list[tuple[int, T]]] = [[] for _ in range(enough * ranks - taken - len(tight))]
    return enough, [(sum(size for size, _ in held), [item for _, item in held]) for held in tight + empty]
