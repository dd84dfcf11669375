"""Fill the cache: one forward pass over every completion that is not in it yet, resumable at any instant.

Packs are taken greedily in data order from what is missing. A pack is stored whole or not at all, so a run that was killed goes
on with exactly the packs that the undisturbed run would have had, and gets the same bits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fasttrain.data.batch import PackBatch, PackMaker, load_packs
from fasttrain.data.groups import image_hash
from fasttrain.data.packs import Pack, Piece, run_tokens
from fasttrain.data.prepared import PreparedData
from fasttrain.errors import UserError
from fasttrain.files import HashMemo
from fasttrain.model.policy import Policy
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
    data: PreparedData, keys: CompletionKeys, cache: ReferenceCache, memo: HashMemo
) -> list[tuple[int, list[int]]]:
    """(group, completions) that are not cached, in data order."""
    result = []
    for number in range(len(data)):
        if not data.pair_count(number):
            continue
        group = data.group(number)
        hashes = [image_hash(ref, memo) for ref in data.images(number)]
        absent = cache.missing(keys.of_group(group.prompt_ids, hashes, group.completion_ids))
        if any(absent):
            result.append((number, [index for index, gone in enumerate(absent) if gone]))
    memo.save()
    return result


def greedy_packs(
    data: PreparedData, missing: list[tuple[int, list[int]]], tokens_per_pack: int, shared: bool
) -> Iterator[Pack]:
    """Next-fit in the given order; every decision depends only on the open pack, so any pack boundary is a fresh start."""
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
            if pieces and held + tokens > tokens_per_pack:
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
    tokens_per_pack: int, workers: int, skip_broken: bool, tick: Callable[[int], object] = lambda n: None,
) -> FillReport:  # fmt: skip
    """Compute and store `missing` with the policy as it is now; a broken image stops, or drops its group."""
    start = time.perf_counter()
    total = sum(len(data.lengths(n)) - 1 for n in range(len(data)) if data.pair_count(n))
    computed = tokens = 0
    dropped: set[int] = set()
    policy.eval()
    packs = greedy_packs(data, missing, tokens_per_pack, policy.shared)
    with contextlib.closing(load_packs(maker, packs, workers, policy.device.type == "cuda")) as batches:
        for batch in batches:
            for number, problem in batch.broken:
                if number in dropped:
                    continue
                if not skip_broken:
                    raise UserError(f"{data.where(number)}: images: wanted an image, got {problem}")
                data.drop(number, f"images: {problem}")
                dropped.add(number)
            if batch.sequence_ids:
                logp_N = policy(batch.to(policy.device)).logprob.cpu().numpy()
                _check_finite(data, batch, logp_N)
                parts = np.split(logp_N, np.cumsum(batch.lengths_S.numpy())[:-1])
                cache.put(zip(batch.keys, parts, strict=True))
                computed += len(parts)
                tokens += len(batch.input_ids_T)
            tick(sum(len(piece.completions) for piece in batch.pack.pieces))
    return FillReport(total, computed, tokens, time.perf_counter() - start)


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
