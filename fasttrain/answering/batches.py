"""Which questions are run together: equal images and equal lengths side by side, as many as a token budget holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass
class Budget:
    """rows: most questions in a batch. tokens: most tokens of keys and values, new ones included; both only shrink."""

    rows: int
    tokens: int

    def halve(self, rows: int, tokens: int) -> None:
        """After a batch of this size ran out of memory."""
        self.rows = max(1, min(self.rows, rows // 2))
        self.tokens = max(1, min(self.tokens, tokens // 2))


def plan_order(lengths: Sequence[int], groups: Sequence[object]) -> list[int]:
    """Questions longest first, those of one group (the same images) kept together at the place of its longest."""
    longest: dict[object, int] = {}
    first: dict[object, int] = {}
    for number, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        longest[group] = max(longest.get(group, 0), length)
        first.setdefault(group, number)
    return sorted(
        range(len(lengths)),
        key=lambda n: (-longest[groups[n]], first[groups[n]], -lengths[n], n),
    )


def take_batches(order: Sequence[int], costs: Sequence[int], budget: Budget) -> Iterator[list[int]]:
    """Consecutive questions whose count times the costliest fits the budget, which may shrink between batches.

    costs: tokens of each question, prompt and all it may say. A question that is alone too large is a batch of its own.
    """
    batch: list[int] = []
    most = 0
    for number in order:
        cost = max(most, costs[number])
        if batch and (len(batch) + 1 > budget.rows or (len(batch) + 1) * cost > budget.tokens):
            yield batch
            batch, cost = [], costs[number]
        batch.append(number)
        most = cost
    if batch:
        yield batch


def halving(
    batch: list[Item], run: Callable[[list[Item]], None], out_of_memory: Callable[[BaseException], bool],
    smaller: Callable[[list[Item]], None],
) -> None:  # fmt: skip
    """`run` the batch; when it is out of memory, tell `smaller` and run its halves. A single item's failure is raised."""
    failed = False
    try:
        run(batch)
    except RuntimeError as error:
        if len(batch) == 1 or not out_of_memory(error):
            raise
        failed = True  # the halves run outside, where the failed pass no longer holds its tensors
    if failed:
        smaller(batch)
        middle = len(batch) // 2
        halving(batch[:middle], run, out_of_memory, smaller)
        halving(batch[middle:], run, out_of_memory, smaller)
