"""Fill the cache: one forward pass over every completion that is not in it yet, resumable at any instant.

Packs are taken greedily in data order from what is missing, and dealt to the ranks in turn. The packs that ranks run at the same
time are stored together or not at all, so a run that was killed goes on, with any number of ranks, with exactly the packs that
the undisturbed run would have had, and gets the same bits.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fasttrain.data.batch import PackBatch, PackMaker, load_packs
from fasttrain.data.groups import image_hash
from fasttrain.data.packs import Pack, Piece, in_round, run_tokens
from fasttrain.data.prepared import PreparedData
from fasttrain.errors import UserError
from fasttrain.files import HashMemo
from fasttrain.model.policy import Policy
from fasttrain.ranks import is_node_writer, ranks
from fasttrain.reference.cache import ReferenceCache
from fasttrain.reference.key import CompletionKeys


@dataclass(frozen=True)
class FillReport:
    """What a fill did."""

    completions: int
    computed: int
    tokens: int
    seconds: float


def missing_completions(
    data: PreparedData,
    keys: CompletionKeys,
    cache: ReferenceCache,
    memo: HashMemo,
    groups: Iterable[int] | None = None,
) -> list[tuple[int, list[int]]]:
    """(group, completions) that are not cached, in data order, of all groups or of `groups`."""
    result = []
    for number in range(len(data)) if groups is None else sorted(groups):
        if not data.pair_count(number):
            continue
        group = data.group(number)
        hashes = [image_hash(ref, memo) for ref in data.images(number)]
        absent = cache.missing(keys.of_group(group.prompt_ids, hashes, group.completion_ids))
        if any(absent):
            result.append((number, [index for index, gone in enumerate(absent) if gone]))
    memo.save()
    return _of_all_machines(result)


def _of_all_machines(missing: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """What is missing in some machine's cache, the same list on every rank."""
    digest = hash(
        tuple((number, *gone) for number, gone in missing)
    )  # of integers only: equal in every process
    if len(set(ranks().gather(digest))) == 1:
        return missing
    union: dict[int, set[int]] = {}
    for theirs in ranks().gather(missing):
        for number, gone in theirs:
            union.setdefault(number, set()).update(gone)
    return [(number, sorted(gone)) for number, gone in sorted(union.items())]


def rounds(packs: Iterable[Pack], data: PreparedData) -> Iterator[Pack]:
    """This rank's pack of every round; a repeat of the round's first where the packs have run out."""
    here = ranks()
    packs = iter(packs)
    while dealt := list(itertools.islice(packs, here.size)):
        if here.size > 1:
            dealt += [replace(dealt[0], fill=True)] * (here.size - len(dealt))
            dealt = in_round(dealt, set(), data)
        yield dealt[here.rank]


def greedy_packs(
    data: PreparedData, missing: list[tuple[int, list[int]]], tokens_per_pack: int, shared: bool,
    filled_to: int | None = None,
) -> Iterator[Pack]:  # fmt: skip
    """Next-fit in the given order; every decision depends only on the open pack, so any pack boundary is a fresh start."""
    filled_to = filled_to or tokens_per_pack
    pieces: list[Piece] = []
    held = 0
    for number, completions in missing:
        lengths = data.lengths(number)
        rest = list(completions)
        while rest:
            taken = 1
            while taken < len(rest) and _cost(lengths, rest[: taken + 1], shared) <= tokens_per_pack:
                taken += 1
            tokens = _cost(lengths, rest[:taken], shared)
            if pieces and held + tokens > filled_to:
                yield Pack(tuple(pieces), shared)
                pieces, held = [], 0
            pieces.append(Piece(number, tuple(rest[:taken])))
            held += tokens
            rest = rest[taken:]
    if pieces:
        yield Pack(tuple(pieces), shared)


def _cost(lengths: np.ndarray, completions: list[int], shared: bool) -> int:
    return run_tokens(lengths[[0, *(1 + index for index in completions)]], shared)


@torch.no_grad()
def fill(
    policy: Policy, data: PreparedData, maker: PackMaker, cache: ReferenceCache, missing: list[tuple[int, list[int]]], *,
    tokens_per_pack: int, workers: int, filled_to: int | None = None, tick: Callable[[int], object] = lambda n: None,
) -> FillReport:  # fmt: skip
    """Compute and store `missing` with the policy as it is now; UserError at a broken image."""
    start = time.perf_counter()
    total = data.completions()
    computed = tokens = 0
    policy.eval()
    packs = rounds(greedy_packs(data, missing, tokens_per_pack, policy.shared, filled_to), data)
    with contextlib.closing(load_packs(maker, packs, workers, policy.device.type == "cuda")) as batches:
        for batch in batches:
            ranks().share_mistake(_why_not(data, batch))
            found = ranks().gather(_Round(*_run(policy, data, batch)))
            mistakes = [part.mistake for part in found if part.mistake]
            if mistakes:
                ranks().share_mistake(UserError(mistakes[0]))
            for part in found:
                computed += len(part.rows)
                tokens += part.tokens
                tick(part.completions)
            if is_node_writer():
                cache.put(row for part in found for row in part.rows)
    ranks().barrier()
    return FillReport(total, computed, tokens, time.perf_counter() - start)


class _Round(NamedTuple):
    """What one rank has of a round."""

    rows: list[tuple[bytes, np.ndarray]]
    tokens: int
    completions: int
    mistake: str | None


def _why_not(data: PreparedData, batch: PackBatch) -> UserError | None:
    """Why a pack cannot be run, known before any rank runs its own: under ZeRO-3 a pass waits for those of the others."""
    if not batch.broken:
        return None
    number, problem = batch.broken[0]
    return UserError(f"{data.where(number)}: images: wanted an image, got {problem}")


def _run(policy: Policy, data: PreparedData, batch: PackBatch) -> tuple[Any, ...]:
    """The log-probs of a pack, with what went wrong as a value: the other ranks must hear of it."""
    logp_N = policy(batch.to(policy.device)).logprob.cpu().numpy()
    if batch.pack.fill:
        return [], 0, 0, None
    try:
        _check_finite(data, batch, logp_N)
    except UserError as error:
        return [], 0, 0, str(error)
    parts = np.split(logp_N, np.cumsum(batch.lengths_S.numpy())[:-1])
    completions = sum(len(piece.completions) for piece in batch.pack.pieces)
    return list(zip(batch.keys, parts, strict=True)), len(batch.input_ids_T), completions, None


def _check_finite(data: PreparedData, batch: PackBatch, logp_N: np.ndarray) -> None:
    """UserError at a log-prob that is no number: stored, it would stop every later run too."""
    if np.isfinite(logp_N).all():
        return
    row = int(np.flatnonzero(~np.isfinite(logp_N))[0])
    sequence = int(np.searchsorted(np.cumsum(batch.lengths_S.numpy()), row, side="right"))
    group, _ = batch.sequence_ids[sequence]
    raise UserError(
        f"model.name: the model gives a log-prob of {logp_N[row]} for an answer of {data.where(group)}: its weights hold "
        "numbers that are not finite, or overflow in model.dtype"
    )
