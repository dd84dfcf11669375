"""Steps and packs: whole groups per step, every completion once, within the budget, the same for the same seed."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.data.packs import Order, Pack, Piece, plan_step
from fasttrain.errors import UserError
from fasttrain.reference.fill import greedy_packs

# A group: prompt length, completion lengths, pairs among them.
lengths = st.tuples(
    st.integers(1, 60), st.lists(st.integers(1, 40), min_size=2, max_size=7), st.integers(1, 9)
)
groups = st.lists(lengths, min_size=1, max_size=25)
budgets = st.integers(1, 300)


def data_of(shape: list[tuple[int, list[int], int]]) -> Any:
    """As much of PreparedData as packing asks for."""
    return _Data(shape)


class _Data:
    def __init__(self, shape: list[tuple[int, list[int], int]]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return len(self.shape)

    def lengths(self, number: int) -> np.ndarray:
        prompt, completions, _ = self.shape[number]
        return np.array([prompt, *completions])

    def scored(self, number: int) -> np.ndarray:
        return np.array(self.shape[number][1])

    def pair_count(self, number: int) -> int:
        return self.shape[number][2]

    def pair_counts(self) -> np.ndarray:
        return np.array([count for _, _, count in self.shape], np.int64)

    def pairs(self, number: int) -> np.ndarray:
        _, completions, count = self.shape[number]
        every = itertools.cycle(itertools.permutations(range(len(completions)), 2))
        return np.array(list(itertools.islice(every, count)))

    def image_count(self, number: int) -> int:
        return self.shape[number][0] % 2  # every other prompt has an image

    def group(self, number: int) -> Any:
        return SimpleNamespace(number=number, pairs=self.pairs(number))


def cost(data: Any, pack: Pack) -> int:
    """Tokens of a pack, counted one by one."""
    total = 0
    for piece in pack.pieces:
        prompt, *completions = data.lengths(piece.group).tolist()
        prompts = 1 if pack.shared else len(piece.completions)
        total += prompts * prompt + sum(completions[index] for index in piece.completions)
    return total


def completions(packs: Any) -> Counter[tuple[int, int]]:
    return Counter(
        (piece.group, index) for pack in packs for piece in pack.pieces for index in piece.completions
    )


def order(data: Any, pairs_per_step: int = 8, shuffle: bool = True, seed: int = 0) -> Order:
    return Order(data, pairs_per_step, shuffle, seed)


def plan(data: Any, numbers: Any, budget: int, shared: bool) -> Any:
    return plan_step(data, 1, 0.5, np.asarray(numbers), budget, shared)


@settings(deadline=None)
@given(groups, budgets, st.booleans())
def test_every_completion_of_a_step_runs_exactly_once(shape: Any, budget: int, shared: bool) -> None:
    data = data_of(shape)
    numbers = list(range(0, len(shape), 2))
    step = plan(data, numbers, budget, shared)
    every = [(number, index) for number in numbers for index in range(len(shape[number][1]))]
    assert completions(step.packs) == Counter(every)
    assert step.pairs == sum(shape[number][2] for number in numbers)
    assert step.groups == tuple(numbers) and all(pack.shared == shared for pack in step.packs)


@settings(deadline=None)
@given(groups, budgets)
def test_the_mean_chosen_length_is_that_of_the_pairs_of_the_whole_step(shape: Any, budget: int) -> None:
    data = data_of(shape)
    chosen = [shape[number][1][pair[0]] for number in range(len(shape)) for pair in data.pairs(number)]
    step = plan(data, range(len(shape)), budget, True)
    assert step.mean_chosen_length == pytest.approx(sum(chosen) / len(chosen))


@settings(deadline=None)
@given(groups, budgets, st.booleans())
def test_a_pack_exceeds_the_budget_only_for_one_completion_that_does_not_fit(
    shape: Any, budget: int, shared: bool
) -> None:
    data = data_of(shape)
    for pack in plan(data, range(len(shape)), budget, shared).packs:
        assert cost(data, pack) <= budget or completions([pack]).total() == 1


@settings(deadline=None)
@given(groups, budgets, st.booleans())
def test_a_group_is_split_only_when_it_does_not_fit_and_is_marked(
    shape: Any, budget: int, shared: bool
) -> None:
    data = data_of(shape)
    step = plan(data, range(len(shape)), budget, shared)
    spread = Counter(number for pack in step.packs for number in {piece.group for piece in pack.pieces})
    assert step.split == {number for number, packs in spread.items() if packs > 1}
    for number in step.split:
        prompt, answers, _ = shape[number]
        assert sum(answers) + prompt * (1 if shared else len(answers)) > budget


@settings(deadline=None)
@given(groups, budgets)
def test_no_two_packs_of_whole_groups_would_fit_in_one(shape: Any, budget: int) -> None:
    data = data_of(shape)
    step = plan(data, range(len(shape)), budget, True)
    whole = [cost(data, pack) for pack in step.packs if not any(p.group in step.split for p in pack.pieces)]
    fitting = sorted(tokens for tokens in whole if tokens <= budget)
    assert not fitting[1:] or fitting[0] + fitting[1] > budget


@settings(deadline=None)
@given(groups, budgets, budgets, st.booleans(), st.integers(1, 4))
def test_packs_are_filled_up_to_less_than_they_may_have_and_split_no_group_for_it(
    shape: Any, budget: int, fill: int, shared: bool, ranks: int
) -> None:
    """Where packs are filled to less than the budget, what is longer than that runs alone, and what is split stays the same."""
    data, numbers, fill = data_of(shape), np.arange(len(shape)), min(budget, fill)
    step = plan_step(data, 1, 0.5, numbers, budget, shared, ranks, fill)
    assert step.split == plan(data, numbers, budget, shared).split
    work = [pack for pack in step.packs if not pack.fill]
    assert set(completions(work)) == {(n, c) for n in range(len(shape)) for c in range(len(shape[n][1]))}
    for pack in work:
        assert cost(data, pack) <= fill or len(pack.pieces) == 1
    gone = [(number, list(range(len(shape[number][1])))) for number in range(len(shape))]
    for pack in greedy_packs(data, gone, budget, shared, fill):
        assert cost(data, pack) <= fill or len(pack.pieces) == 1
        assert cost(data, pack) <= budget or completions([pack]).total() == 1


# ---- several ranks -------------------------------------------------------------------------------------------------

counts = st.integers(2, 9)


def plan_ranks(shape: Any, budget: int, shared: bool, ranks: int) -> tuple[Any, Any, list[Any]]:
    """The data, the whole step, and the steps of all ranks."""
    data = data_of(shape)
    step = plan_step(data, 1, 0.5, np.arange(len(shape)), budget, shared, ranks)
    return data, step, [step.for_rank(rank) for rank in range(ranks)]


def rounds_of(steps: list[Any]) -> list[tuple[Pack, ...]]:
    return list(zip(*[step.packs for step in steps], strict=True))


@settings(deadline=None)
@given(groups, budgets, st.booleans(), counts)
def test_ranks_run_every_completion_once_and_equally_many_packs(
    shape: Any, budget: int, shared: bool, ranks: int
) -> None:
    _, whole, steps = plan_ranks(shape, budget, shared, ranks)
    assert len({len(step.packs) for step in steps}) == 1
    work = [pack for step in steps for pack in step.packs if not pack.fill]
    every = [(number, index) for number in range(len(shape)) for index in range(len(shape[number][1]))]
    assert completions(work) == Counter(every)
    for step in steps:  # the loss is the mean over all ranks' pairs
        assert (step.pairs, step.groups, step.mean_chosen_length) == (
            whole.pairs, whole.groups, whole.mean_chosen_length
        )  # fmt: skip
        assert all(pack.pieces for pack in step.packs)


@settings(deadline=None)
@given(groups, budgets, st.booleans(), counts)
def test_what_fills_a_rank_is_one_completion_of_the_step_no_dearer_than_any(
    shape: Any, budget: int, shared: bool, ranks: int
) -> None:
    data, _, steps = plan_ranks(shape, budget, shared, ranks)
    cheapest = min(prompt + min(answers) for prompt, answers, _ in shape)
    for pack in (pack for step in steps for pack in step.packs if pack.fill):
        assert completions([pack]).total() == 1 and cost(data, pack) == cheapest


@settings(deadline=None)
@given(groups, budgets, st.booleans(), counts)
def test_ranks_keep_to_the_budget_and_split_what_one_rank_splits(
    shape: Any, budget: int, shared: bool, ranks: int
) -> None:
    data, whole, steps = plan_ranks(shape, budget, shared, ranks)
    assert whole.split == plan(data, range(len(shape)), budget, shared).split
    for step in steps:
        for pack in step.packs:
            assert cost(data, pack) <= budget or completions([pack]).total() == 1
    for group in whole.split:  # the pairs of a group meet on one rank
        homes = [any(p.group == group for k in s.packs if not k.fill for p in k.pieces) for s in steps]
        assert sum(homes) == 1


@settings(deadline=None)
@given(groups, budgets, st.booleans(), counts)
def test_all_ranks_are_told_what_any_rank_needs_in_a_round(
    shape: Any, budget: int, shared: bool, ranks: int
) -> None:
    data, whole, steps = plan_ranks(shape, budget, shared, ranks)
    for packs in rounds_of(steps):
        groups_here = {piece.group for pack in packs for piece in pack.pieces}
        work = {piece.group for pack in packs if not pack.fill for piece in pack.pieces}
        assert {pack.images for pack in packs} == {any(data.image_count(g) for g in groups_here)}
        if work & whole.split:
            assert all(pack.twice for pack in packs)
        assert len({pack.twice for pack in packs}) == 1
        most = max(completions([pack]).total() for pack in packs)
        assert {pack.passes for pack in packs} == {0 if shared else most}


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=20, max_size=60), st.integers(100, 400), counts)
def test_ranks_hold_equal_shares_and_run_hardly_more_rounds_than_they_must(
    prompts: list[int], budget: int, ranks: int
) -> None:
    shape = [(prompt, [1, 2], 1) for prompt in prompts if prompt + 3 <= budget]
    if not shape:
        return
    data, whole, steps = plan_ranks(shape, budget, True, ranks)
    largest = max(cost(data, pack) for pack in plan(data, range(len(shape)), 1, True).packs)
    held = [sum(cost(data, pack) for pack in step.packs if not pack.fill) for step in steps]
    packs = len(plan(data, range(len(shape)), budget, True).packs)
    assert len(steps[0].packs) <= -(-packs // ranks)  # never more than dealing out one rank's packs
    assert len(steps[0].packs) * ranks * budget >= sum(held)
    if len(steps[0].packs) < -(-packs // ranks):  # else the packs may be too full to be levelled
        assert max(held) - min(held) <= largest


@pytest.mark.parametrize(("groups_per_rank", "seeds"), [(4, 12), (8, 8), (32, 1)])
def test_64_ranks_share_a_step_evenly_from_four_groups_a_rank(groups_per_rank: int, seeds: int) -> None:
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        shape = [
            (int(rng.integers(580, 700)), rng.integers(20, 260, int(rng.integers(2, 5))).tolist(), 1)
            for _ in range(64 * groups_per_rank)
        ]
        data, _, steps = plan_ranks(shape, 8192, True, 64)
        held = [sum(cost(data, pack) for pack in step.packs) for step in steps]
        assert max(held) / (sum(held) / len(held)) < 1.01
        for packs in rounds_of(steps):  # under ZeRO-3 ranks wait for each other in every round
            sizes = [cost(data, pack) for pack in packs]
            assert max(sizes) / (sum(sizes) / len(sizes)) < 1.05


def test_fewer_groups_than_ranks_leave_filled_ranks() -> None:
    _, _, steps = plan_ranks([(9, [4, 2], 1), (7, [3, 3], 1)], 100, True, 5)
    assert [[pack.fill for pack in step.packs] for step in steps].count([True]) == 3
    assert all(
        step.packs == (Pack((Piece(1, (0,)),), fill=True, images=True),)
        for step in steps
        if step.packs[0].fill
    )


# ---- steps over an epoch -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(groups, st.integers(1, 40), st.booleans(), st.integers(0, 5), st.integers(0, 3))
def test_a_step_takes_whole_groups_until_it_holds_enough_pairs(
    shape: Any, wanted: int, shuffle: bool, seed: int, epoch: int
) -> None:
    data = data_of(shape)
    steps = order(data, wanted, shuffle, seed).steps_in(epoch)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(shape)))
    held = [[shape[number][2] for number in step.tolist()] for step in steps]
    assert all(sum(pairs) >= wanted for pairs in held[:-1])
    assert all(sum(pairs[:-1]) < wanted for pairs in held)  # without its last group it would hold too few
    if not shuffle:
        assert np.concatenate(steps).tolist() == list(range(len(shape)))


SMALL = data_of([(5, [3, 4], 1 + number % 3) for number in range(40)])


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    def flat(seed: int, epoch: int) -> list[int]:
        return np.concatenate(order(SMALL, seed=seed).steps_in(epoch)).tolist()

    assert flat(1, 0) == flat(1, 0)
    assert len({tuple(flat(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9
    assert sorted(flat(1, 0)) == list(range(40)) != flat(1, 0)


def test_without_shuffle_every_epoch_is_in_file_order() -> None:
    for epoch in (0, 1):
        groups = np.concatenate(order(SMALL, shuffle=False).steps_in(epoch))
        assert groups.tolist() == list(range(40))


def test_steps_run_over_epochs_and_resume_anywhere() -> None:
    made = order(SMALL, 10)
    total = made.total_steps(2.5)
    steps = [(number, epoch, tuple(groups)) for number, epoch, groups in made.steps(1, total)]
    first, second, third = (made.steps_in(epoch) for epoch in (0, 1, 2))
    half = -(-len(third) // 2)
    assert [step[2] for step in steps] == [tuple(s.tolist()) for s in (*first, *second, *third[:half])]
    assert [step[0] for step in steps] == list(range(1, total + 1))
    assert steps[len(first) - 1][1] == 1.0 and steps[len(first) + len(second) - 1][1] == 2.0
    for start in (1, 2, len(first), len(first) + 1, total):
        again = [(number, epoch, tuple(groups)) for number, epoch, groups in made.steps(start, total)]
        assert again == steps[start - 1 :]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 8), (2, 16), (0.5, 4), (0.01, 1), (1.25, 10), (1.26, 11)])
def test_a_part_of_an_epoch_is_that_part_of_its_steps(epochs: float, steps: int) -> None:
    assert order(data_of([(5, [1, 1], 1)] * 64), 8).total_steps(epochs) == steps


def test_groups_without_pairs_are_left_out() -> None:
    data = data_of([(5, [3, 4], 1), (5, [3, 4], 0), (5, [3, 4], 1)])
    assert sorted(np.concatenate(order(data, 1).steps_in(0)).tolist()) == [0, 2]


@settings(deadline=None)
@given(groups, st.booleans(), st.integers(0, 5), st.integers(0, 3), st.data())
def test_a_group_dropped_late_leaves_the_others_in_their_order(
    shape: Any, shuffle: bool, seed: int, epoch: int, draw: Any
) -> None:
    dropped = draw.draw(st.sets(st.integers(0, len(shape) - 1), max_size=len(shape) - 1))
    less = [
        (prompt, answers, 0 if n in dropped else pairs) for n, (prompt, answers, pairs) in enumerate(shape)
    ]
    before, after = (order(data_of(s), 8, shuffle, seed).epoch_groups(epoch).tolist() for s in (shape, less))
    assert after == [number for number in before if number not in dropped]


def test_checkpoints_of_earlier_versions_go_on_with_the_same_order() -> None:
    for seed, epoch in itertools.product(range(3), repeat=2):
        truth = np.random.default_rng([seed, 1, epoch]).permutation(np.arange(40))
        assert order(SMALL, seed=seed).epoch_groups(epoch).tolist() == truth.tolist()


def test_data_that_lost_all_its_pairs_ends_the_run_instead_of_looking_for_steps_forever() -> None:
    data = data_of([(5, [3, 4], 0)] * 3)
    with pytest.raises(UserError, match="wanted at least one usable pair, got none"):
        next(iter(order(data).steps(1, 10)))
    with pytest.raises(UserError, match="wanted at least one usable pair, got none"):
        order(data).total_steps(2)


# ---- the packs of the reference cache ------------------------------------------------------------------------------

missing = st.lists(
    st.tuples(lengths, st.sets(st.integers(0, 6), min_size=1)), min_size=1, max_size=20
)  # of each group, the completions that are not cached


def some_missing(drawn: Any) -> tuple[Any, list[tuple[int, list[int]]]]:
    data = data_of([shape for shape, _ in drawn])
    gone = [(n, sorted(i for i in want if i < len(shape[1]))) for n, (shape, want) in enumerate(drawn)]
    return data, [(number, indices) for number, indices in gone if indices]


@settings(deadline=None)
@given(missing, budgets, st.booleans())
def test_a_fill_runs_exactly_what_is_missing_within_the_budget(drawn: Any, budget: int, shared: bool) -> None:
    data, gone = some_missing(drawn)
    packs = list(greedy_packs(data, gone, budget, shared))
    assert completions(packs) == Counter((number, index) for number, indices in gone for index in indices)
    for pack in packs:
        assert cost(data, pack) <= budget or completions([pack]).total() == 1


@settings(deadline=None)
@given(missing, budgets, st.booleans(), st.integers(0, 50))
def test_a_fill_cut_off_after_any_pack_goes_on_with_the_same_packs(
    drawn: Any, budget: int, shared: bool, done: int
) -> None:
    data, gone = some_missing(drawn)
    packs = list(greedy_packs(data, gone, budget, shared))
    stored = completions(packs[:done])
    left = [(number, [i for i in indices if (number, i) not in stored]) for number, indices in gone]
    again = list(
        greedy_packs(data, [(number, indices) for number, indices in left if indices], budget, shared)
    )
    assert again == packs[done:]
