"""Which groups make a step, and which completions run together in one forward pass.

A step takes whole groups in a seeded order until it holds enough pairs. A step is cut into packs of at most
`tokens_per_pack` tokens, for one rank or several; how it is cut never changes its loss or gradient. Groups are put together
up to `filled_to` tokens; one that has more runs alone, and only one above `tokens_per_pack` is split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fasttrain.data.bins import deal, first_fit_decreasing
from fasttrain.data.prepared import PreparedData
from fasttrain.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Some completions of one group, behind its prompt."""

    group: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class Pack:
    """What one forward pass holds. With `shared=False` every completion is an ordinary sequence of its own.

    All ranks must call the same modules equally often, so a pack also says what the packs that other ranks run at the same
    time need: the fields from `fill` on. On one rank they keep their defaults.
    """

    pieces: tuple[Piece, ...]
    shared: bool = True
    twice: bool = (
        False  # values first, gradients later: this pack, or another rank's, holds a part of a split group
    )
    fill: bool = False  # a repeat of other work, counted with weight zero, for a rank that has nothing left
    images: bool = False  # some rank's pack has images: a sequence without runs a blank one at weight zero
    passes: int = (
        0  # unshared: passes of the rank that has most; a pack with fewer runs the rest at weight zero
    )


@dataclass(frozen=True)
class Step:
    """The packs of one optimizer step; those of several ranks in turn: round by round, and in a round rank by rank.

    Every part of a split group is on one rank. Pairs and lengths are those of all ranks.
    """

    number: int
    epoch: float
    groups: tuple[int, ...]
    pairs: int
    mean_chosen_length: float  # targets per pair
    packs: tuple[Pack, ...]
    split: frozenset[int]  # groups whose completions are spread over several packs
    ranks: int = 1

    def for_rank(self, rank: int) -> Step:
        """The same step with the packs of one rank, as many as every other rank has."""
        return replace(self, packs=self.packs[rank :: self.ranks], ranks=1)


@dataclass(frozen=True)
class Order:
    """The groups of every epoch, in order, cut into steps."""

    data: PreparedData
    pairs_per_step: int
    shuffle: bool
    seed: int

    def epoch_groups(self, epoch: int) -> np.ndarray:
        """Group numbers in the order of this epoch, without those that have no pairs.

        All are shuffled, whatever pairs they have: a group dropped late leaves the others where they were.
        """
        counts = self._counts()
        if not counts.any():  # every image turned out broken
            raise UserError(
                "data.train: wanted at least one usable pair, got none after all images were read"
            )
        numbers = np.arange(len(counts))
        if self.shuffle:
            numbers = np.random.default_rng([self.seed, 1, epoch]).permutation(numbers)
        return numbers[counts[numbers] > 0]

    def steps_in(self, epoch: int) -> list[np.ndarray]:
        """The groups of each step; the last step of an epoch holds what is left."""
        groups, cuts = self._cut(epoch)
        return [groups[start:end] for start, end in itertools.pairwise(cuts)]

    def _cut(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The epoch's groups in order, and where its steps begin and the last one ends."""
        groups = self.epoch_groups(epoch)
        held = np.cumsum(self._counts()[groups])
        before = np.r_[0, held[:-1]]
        # where a step that begins at a group ends, for all groups at once: an epoch may have a million steps
        ends = np.minimum(np.searchsorted(held, before + self.pairs_per_step) + 1, len(groups)).tolist()
        cuts = [0]
        while cuts[-1] < len(groups):
            cuts.append(ends[cuts[-1]])
        return groups, cuts

    def _counts(self) -> np.ndarray:
        return self.data.pair_counts()

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs; a part of an epoch is that part of its steps, rounded up."""
        whole = math.floor(epochs)
        steps = sum(len(self._cut(epoch)[1]) - 1 for epoch in range(whole))
        if epochs > whole:
            steps += math.ceil((epochs - whole) * (len(self._cut(whole)[1]) - 1) - 1e-9)
        return steps

    def groups_of_short_run(self, steps: int | None) -> list[int] | None:
        """Groups of the first `steps` steps, sorted; None where these are no less than a tenth of all pairs."""
        if steps is None or 10 * steps * self.pairs_per_step > self.data.account.pairs:
            return None
        return sorted({int(group) for _, _, groups in self.steps(1, steps) for group in groups})

    def steps(self, first: int, last: int) -> Iterator[tuple[int, float, np.ndarray]]:
        """(step number from 1, epochs done when it ends, its groups) for steps first..last."""
        number = 0
        for epoch in itertools.count():
            groups, cuts = self._cut(epoch)
            for index, (start, end) in enumerate(itertools.pairwise(cuts), start=1):
                number += 1
                if number > last:
                    return
                if number >= first:
                    yield number, epoch + index / (len(cuts) - 1), groups[start:end]


def plan_step(
    data: PreparedData,
    number: int,
    epoch: float,
    groups: np.ndarray,
    tokens_per_pack: int,
    share_prefix: bool,
    ranks: int = 1,
    filled_to: int | None = None,
) -> Step:
    """Cut one step into packs, equally many on each rank; groups that are too long are split by completions.

    One rank fills as few packs as it can. Several ranks get equal shares, in as few rounds as that takes. `filled_to` is
    `tokens_per_pack` if not given.
    """
    filled_to = filled_to or tokens_per_pack
    whole: list[tuple[int, Piece]] = []
    parts: list[list[Pack]] = []  # of each group that is too long
    split = set()
    for group in groups.tolist():
        lengths = data.lengths(group)
        tokens = run_tokens(lengths, share_prefix)
        if tokens <= tokens_per_pack:
            whole.append((tokens, Piece(group, tuple(range(len(lengths) - 1)))))
            continue
        pieces = split_group(group, lengths, tokens_per_pack, share_prefix)
        parts.append([Pack((piece,), share_prefix, twice=len(pieces) > 1) for piece in pieces])
        if len(pieces) > 1:
            split.add(group)
    if ranks == 1:
        packs = [pack for packs in parts for pack in packs]
        packs += [Pack(tuple(pieces), share_prefix) for pieces in first_fit_decreasing(whole, filled_to)]
    else:
        packs = _deal(data, whole, parts, filled_to, share_prefix, ranks)
    chosen = [data.scored(group)[data.pairs(group)[:, 0]] for group in groups.tolist()]
    pairs = sum(map(len, chosen))
    mean = sum(int(lengths.sum()) for lengths in chosen) / max(1, pairs)
    return Step(number, epoch, tuple(groups.tolist()), pairs, mean, tuple(packs), frozenset(split), ranks)


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


def _deal(
    data: PreparedData, whole: list[tuple[int, Piece]], parts: list[list[Pack]], budget: int, shared: bool,
    ranks: int,
) -> list[Pack]:  # fmt: skip
    """Packs of all ranks, round by round; what is left empty is filled, and each says what its round needs."""
    chains = []
    for part in parts:
        chain = [(_tokens(data, pack.pieces, shared), pack.pieces[0]) for pack in part]
        if len(chain) > 1:
            chains.append(chain)
        else:
            whole = [*whole, chain[0]]  # one completion that is too long
    split = {piece.group for chain in chains for _, piece in chain}
    every = [piece for _, piece in whole] + [piece for chain in chains for _, piece in chain]
    rounds = deal(whole, chains, budget, ranks)
    filler = Pack((), shared)
    if not all(bins for dealt in rounds for bins in dealt):
        filler = Pack((_smallest(data, every, shared),), shared, fill=True)
    packs = []
    for dealt in rounds:
        packs += in_round([Pack(tuple(bins), shared) if bins else filler for bins in dealt], split, data)
    return packs


def _tokens(data: PreparedData, pieces: tuple[Piece, ...], shared: bool) -> int:
    held = [data.lengths(piece.group)[[0, *(1 + c for c in piece.completions)]] for piece in pieces]
    return sum(run_tokens(lengths, shared) for lengths in held)


def _smallest(data: PreparedData, pieces: list[Piece], shared: bool) -> Piece:
    """The cheapest single completion among the pieces."""
    one = [Piece(piece.group, (completion,)) for piece in pieces for completion in piece.completions]
    return min(one, key=lambda piece: _tokens(data, (piece,), shared))


def in_round(packs: list[Pack], split: set[int], data: PreparedData) -> list[Pack]:
    """The packs that ranks run at the same time, each with what the others need of it."""
    groups = [piece.group for pack in packs for piece in pack.pieces]
    twice = not split.isdisjoint(groups)
    images = any(data.image_count(group) for group in groups)
    runs = [sum(len(piece.completions) for piece in pack.pieces) for pack in packs]
    passes = 0 if packs[0].shared else max(runs)
    return [replace(pack, twice=twice, images=images, passes=passes) for pack in packs]
