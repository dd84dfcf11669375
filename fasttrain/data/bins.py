"""Bin packing: sized items into bins of a budget, for one rank or evenly for several."""

from __future__ import annotations

import heapq
from typing import TypeVar

T = TypeVar("T")


def first_fit_decreasing(sized: list[tuple[int, T]], budget: int) -> list[list[T]]:
    """Items in bins of at most `budget`: each, largest first, into the first bin that has room."""
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
    columns: list[list[list[T]]] = [[] for _ in range(ranks)]
    for chain in sorted(chains, key=lambda chain: -len(chain)):
        rank = min(range(ranks), key=lambda rank: (len(columns[rank]), held[rank]))
        columns[rank] += [[item] for _, item in chain]
        held[rank] += sum(size for size, _ in chain)
    taken = sum(map(len, columns))
    rounds, bins = _fewest_rounds(sized, taken, max(map(len, columns)), budget, ranks)
    bins.sort(key=lambda entry: entry[0])
    for depth in range(rounds):  # the largest bins first, each to the rank that holds least
        for rank in sorted(range(ranks), key=lambda rank: held[rank]):
            if len(columns[rank]) == depth:
                size, items = bins.pop()
                columns[rank].append(items)
                held[rank] += size
    return [[column[depth] for column in columns] for depth in range(rounds)]


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
