"""Which groups make a step, and which completions run together in one forward pass.

A step takes whole groups in a seeded order until it holds enough pairs. A step is cut into packs of at most
`tokens_per_pack` tokens; how it is cut never changes its loss or gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fasttrain.data.prepared import PreparedData
from fasttrain.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Some completions of one group, behind its prompt."""

    group: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class Pack:
    """What one forward pass holds. With `shared=False` every completion is an ordinary sequence of its own."""

    pieces: tuple[Piece, ...]
    shared: bool = True


@dataclass(frozen=True)
class Step:
    """The packs of one optimizer step."""

    number: int
    epoch: float
    groups: tuple[int, ...]
    pairs: int
    mean_chosen_length: float  # tokens per pair
    packs: tuple[Pack, ...]
    split: frozenset[int]  # groups whose completions are spread over several packs


@dataclass(frozen=True)
class Order:
    """The groups of every epoch, in order, cut into steps."""

    data: PreparedData
    pairs_per_step: int
    shuffle: bool
    seed: int

    def epoch_groups(self, epoch: int) -> np.ndarray:
        """Group numbers in the order of this epoch; groups without pairs are left out."""
        counts = self._counts()
        numbers = np.flatnonzero(counts)
        if not len(numbers):  # every image turned out broken
            raise UserError(
                "data.train: wanted at least one usable pair, got none after all images were read"
            )
        if self.shuffle:
            numbers = np.random.default_rng([self.seed, 1, epoch]).permutation(numbers)
        return numbers

    def steps_in(self, epoch: int) -> list[np.ndarray]:
        """The groups of each step; the last step of an epoch holds what is left."""
        groups = self.epoch_groups(epoch)
        counts = self._counts()[groups]
        cuts, held = [], 0
        for index, count in enumerate(counts.tolist(), start=1):
            held += count
            if held >= self.pairs_per_step:
                cuts.append(index)
                held = 0
        return [part for part in np.split(groups, cuts) if len(part)]

    def _counts(self) -> np.ndarray:
        return np.fromiter((self.data.pair_count(n) for n in range(len(self.data))), np.int64, len(self.data))

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs; a part of an epoch is that part of its steps, rounded up."""
        whole = math.floor(epochs)
        steps = sum(len(self.steps_in(epoch)) for epoch in range(whole))
        if epochs > whole:
            steps += math.ceil((epochs - whole) * len(self.steps_in(whole)) - 1e-9)
        return steps

    def steps(self, first: int, last: int) -> Iterator[tuple[int, float, np.ndarray]]:
        """(step number from 1, epochs done when it ends, its groups) for steps first..last."""
        number = 0
        for epoch in itertools.count():
            steps = self.steps_in(epoch)
            for index, groups in enumerate(steps, start=1):
                number += 1
                if number > last:
                    return
                if number >= first:
                    yield number, epoch + index / len(steps), groups


def plan_step(
    data: PreparedData,
    number: int,
    epoch: float,
    groups: np.ndarray,
    tokens_per_pack: int,
    share_prefix: bool,
) -> Step:
    """Cut one step into packs: first-fit decreasing over its groups, groups that are too long split by completions."""
    whole: list[tuple[int, Piece]] = []
    packs: list[Pack] = []
    split = set()
    for group in groups.tolist():
        lengths = data.lengths(group)
        if run_tokens(lengths, share_prefix) <= tokens_per_pack:
            piece = Piece(group, tuple(range(len(lengths) - 1)))
            whole.append((run_tokens(lengths, share_prefix), piece))
            continue
        pieces = split_group(group, lengths, tokens_per_pack, share_prefix)
        packs += [Pack((piece,), share_prefix) for piece in pieces]
        if len(pieces) > 1:
            split.add(group)
    packs += [Pack(tuple(pieces), share_prefix) for pieces in _first_fit_decreasing(whole, tokens_per_pack)]
    chosen = [data.lengths(group)[1 + data.pairs(group)[:, 0]] for group in groups.tolist()]
    pairs = sum(map(len, chosen))
    mean = sum(int(lengths.sum()) for lengths in chosen) / max(1, pairs)
    return Step(number, epoch, tuple(groups.tolist()), pairs, mean, tuple(packs), frozenset(split))


def run_tokens(lengths: np.ndarray, share_prefix: bool) -> int:
    """Tokens that a group costs in one pass; `lengths` is the prompt's, then the completions'."""
    completions = len(lengths) - 1
    return int(lengths.sum()) if share_prefix else int(lengths[1:].sum() + completions * lengths[0])


def split_group(
    group: int, lengths: np.ndarray, tokens_per_pack: int, share_prefix: bool, first: int = 0
) -> list[Piece]:
    """Completions from `first` on, as many behind each copy of the prompt as fit, at least one."""
    pieces, held = [], [first]
    for completion in range(first + 1, len(lengths) - 1):
        tried = lengths[[0, *(1 + index for index in held), 1 + completion]]
        if run_tokens(tried, share_prefix) > tokens_per_pack:
            pieces.append(Piece(group, tuple(held)))
            held = []
        held.append(completion)
    return [*pieces, Piece(group, tuple(held))]


def _first_fit_decreasing(sized: list[tuple[int, Piece]], budget: int) -> list[list[Piece]]:
    bins: list[tuple[int, list[Piece]]] = []
    for tokens, piece in sorted(sized, key=lambda entry: -entry[0]):
        for index, (room, pieces) in enumerate(bins):
            if tokens <= room:
                pieces.append(piece)
                bins[index] = (room - tokens, pieces)
                break
        else:
            bins.append((budget - tokens, [piece]))
    return [pieces for _, pieces in bins]
