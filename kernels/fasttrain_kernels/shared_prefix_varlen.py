"""Shared-prefix attention as calls of varlen kernels, which take packed segments of queries and of keys.

Part A: every prompt with its first completion, and every other completion, alone and causal: no copy.
Part B: the other completions over their prompt, not causal; slices where one group has them, gathered rows where several.
With a window there is one part: a completion's keys are the last window - 1 tokens of its prompt, copied, and its own,
so that a window aligned to the ends of queries and keys, as flash-attn's is, is the right one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .shared_prefix import SharedPrefixLayout
from .shared_prefix_plan import All, Gather, Part, Plan, Slice


class Varlen(NamedTuple):
    """Segments of packed queries and keys: int32 (segments + 1,) ends, on the device, and the longest, on the host."""

    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool
    window: int | None = None


def flash_plan(layout: SharedPrefixLayout, window: int | None, device: torch.device) -> Plan:
    """The parts for flash-attn, with their ends and indices on the device: made once per layout, window and device."""
    window = layout.binding_window(window)
    make = _one_part if window is not None else _two_parts
    plan: Plan = layout.cached(("flash", window, str(device)), lambda: make(layout, window, device))
    return plan


def _two_parts(layout: SharedPrefixLayout, window: int | None, device: torch.device) -> Plan:
    runs: list[int] = []
    spans: list[tuple[int, int, int]] = []  # prompt's first row, first row of its other completions, end
    row = 0
    for prompt, lengths in layout.groups:
        runs += [prompt + lengths[0], *lengths[1:]]
        end = row + prompt + sum(lengths)
        if len(lengths) > 1:
            spans.append((row, row + prompt + lengths[0], end))
        row = end
    ends, longest = _ends(runs, device), max(runs)
    first = Part(All(), All(), Varlen(ends, ends, longest, longest, True))
    if not spans:
        return Plan([first], [])
    prompts = [prompt for prompt, lengths in layout.groups if len(lengths) > 1]
    others = [end - own for _, own, end in spans]
    how = Varlen(_ends(others, device), _ends(prompts, device), max(others), max(prompts), False)
    if len(spans) == 1:
        ((start, own, end),) = spans
        return Plan([first], [Part(Slice(own, end), Slice(start, start + prompts[0]), how)])
    rows = _index(((own, end) for _, own, end in spans), device)
    keys = _index(((start, start + prompt) for (start, _, _), prompt in zip(spans, prompts)), device)
    return Plan([first], [Part(Gather(rows), Gather(keys), how)])


def _one_part(layout: SharedPrefixLayout, window: int | None, device: torch.device) -> Plan:
    assert window is not None
    queries: list[int] = []
    keys: list[int] = []
    ranges: list[tuple[int, int]] = []
    row = 0
    for prompt, lengths in layout.groups:
        first = prompt + lengths[0]
        queries.append(first)
        keys.append(first)
        ranges.append((row, row + first))
        own, tail = row + first, min(prompt, window - 1)
        for length in lengths[1:]:
            queries.append(length)
            keys.append(tail + length)
            ranges += [(row + prompt - tail, row + prompt), (own, own + length)]
            own += length
        row = own
    how = Varlen(_ends(queries, device), _ends(keys, device), max(queries), max(keys), True, window)
    alone = len(queries) == len(layout.groups)
    return Plan([Part(All(), All() if alone else Gather(_index(ranges, device)), how)], [])


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def _index(ranges: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    index = torch.cat([torch.arange(start, end) for start, end in ranges])
    return index.to(device, non_blocking=True)
