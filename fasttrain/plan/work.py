"""Tokens, operations and packs of a step, from the lengths of the data and the very planning that training uses."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fasttrain.config import DPOConfig
from fasttrain.data.packs import Order, Pack, Step, plan_step
from fasttrain.data.prepared import PreparedData
from fasttrain.model.flops import ModelShape, pass_flops
from fasttrain.plan.histogram import Histogram
from fasttrain.train.losses import COUPLE_PAIRS

_STEPS_LOOKED_AT = 10


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Means over the steps looked at. `busiest` is the rank with most to do."""

    steps: int  # of the whole run
    pairs: float
    tokens: float  # of all ranks
    tokens_unshared: float  # what a trainer without prefix sharing and cached reference would run
    flops: float  # of all ranks
    packs: float  # of each rank
    busiest_tokens: float
    busiest_flops: float
    balance: float  # busiest / mean, in tokens
    reference_flops: int  # once per data set, all ranks

    @property
    def tokens_per_pair(self) -> float:
        return self.tokens / self.pairs


def measure_work(
    config: DPOConfig, histogram: Histogram, shape: ModelShape, tokens_per_pack: int, checkpointing: bool, ranks: int
) -> StepWork:  # fmt: skip
    """Plan the first steps as training would and count what they cost."""
    data, train = cast(PreparedData, histogram), config.train
    order = Order(data, train.pairs_per_step, train.shuffle, train.seed)
    per_epoch = len(order.steps_in(0))
    total = train.max_steps or order.total_steps(train.epochs)
    steps = [
        plan_step(data, number, epoch, groups, tokens_per_pack, train.share_prefix, ranks)
        for number, epoch, groups in order.steps(1, min(total, per_epoch, _STEPS_LOOKED_AT))
    ]
    coupled, balanced = bool(COUPLE_PAIRS & set(config.loss.kinds)), config.loss.router_aux_weight > 0
    counted = [
        _count(step, histogram, shape, checkpointing, coupled or (balanced and len(step.packs) > ranks))
        for step in steps
    ]
    tokens, flops = (np.array([entry[i] for entry in counted]) for i in (0, 1))  # (steps, ranks)
    return StepWork(
        steps=total,
        pairs=float(np.mean([step.pairs for step in steps])),
        tokens=float(tokens.sum(1).mean()),
        tokens_unshared=float(np.mean([_unshared(step, histogram) for step in steps])),
        flops=float(flops.sum(1).mean()),
        packs=float(np.mean([len(step.packs) / ranks for step in steps])),
        busiest_tokens=float(tokens.max(1).mean()),
        busiest_flops=float(flops.max(1).mean()),
        balance=float((tokens.max(1) / tokens.mean(1)).mean()),
        reference_flops=_reference(histogram, shape, train.share_prefix),
    )


def _count(
    step: Step, histogram: Histogram, shape: ModelShape, checkpointing: bool, coupled: bool
) -> tuple[list[int], list[int]]:
    """Tokens and operations of each rank; coupled: the loss runs every pack twice."""
    ranks = step.ranks
    tokens, flops = [0] * ranks, [0] * ranks
    for index, pack in enumerate(step.packs):
        layout, images, given = pack_layout(histogram, pack)
        held = sum(prompt + sum(completions) for prompt, completions in layout)
        count = functools.partial(pass_flops, shape, layout, images, shared=pack.shared, given=given)
        spent = count(backward=True, checkpointing=checkpointing)
        twice = coupled or pack.twice
        if twice:
            spent += count(backward=False, checkpointing=False)
        tokens[index % ranks] += held * (2 if twice else 1)
        flops[index % ranks] += spent
    return tokens, flops


def pack_layout(data: Histogram | PreparedData, pack: Pack) -> tuple[list[tuple[int, list[int]]], int, int]:
    """Lengths of a pack's prompts, each with those of the completions behind it, its images, and how many tokens of its
    completions are no targets: as `pass_flops` takes them."""
    layout: list[tuple[int, list[int]]] = []
    images = given = 0
    for piece in pack.pieces:
        lengths: list[int] = data.lengths(piece.group).tolist()
        completions = [lengths[1 + c] for c in piece.completions]
        layout += [(lengths[0], completions)] if pack.shared else [(lengths[0], [c]) for c in completions]
        images += data.image_count(piece.group) * (1 if pack.shared else len(completions))
        given += sum(completions) - int(data.scored(piece.group)[list(piece.completions)].sum())
    return layout, images, given


def _unshared(step: Step, data: Any) -> int:
    total = 0
    for group in step.groups:
        lengths = data.lengths(group)
        total += 2 * int(sum(2 * lengths[0] + lengths[1 + c] + lengths[1 + r] for c, r in data.pairs(group)))
    return total


def _reference(histogram: Histogram, shape: ModelShape, shared: bool) -> int:
    total = 0
    for entry in histogram.shapes:
        runs = [list(entry.completions)] if shared else [[length] for length in entry.completions]
        layout = [(entry.prompt, completions) for completions in runs]
        images = entry.images * len(runs)
        given = sum(entry.completions) - sum(entry.scored or entry.completions)
        total += entry.count * pass_flops(
            shape, layout, images, backward=False, checkpointing=False, shared=shared, given=given
        )
    return total
