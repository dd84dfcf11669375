"""What a step is made of: where its time goes, on the device's own timeline, and which pairs it moved most.

Both are collected without making a step wait: times as events that are read when the step is logged, log-ratios as tensors
that stay on the device until then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.prepared import PreparedData
from fasttrain_kernels import pair_sums

PARTS = ("data", "forward", "backward", "update")  # the rest of a step has no name
EXTREMES = 4  # pairs kept of a step, of those that moved most as they should and of those that moved least


class StepClock:
    """Marks where the parts of a step end: on a GPU by events among its kernels, else by the host's clock.

    On a GPU the parts are what the device did, so that waiting for data is the time the device stood idle for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self._marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """What came since the last mark was `part`; nothing is kept of a clock that was not started."""
        if not self._marks:
            return
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by part, and of the whole step as `step`; waits for a GPU to reach the last mark."""
        if not self._marks:
            return {}
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(("step", *PARTS), 0.0)
        for (_, before), (part, now) in zip(self._marks, self._marks[1:]):
            took = before.elapsed_time(now) / 1000 if self._on_gpu else now - before
            seconds["step"] += took
            if part in seconds:
                seconds[part] += took
        return seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class LogRatios:
    """log p(policy) - log p(reference) of a step's chosen and rejected answers, in nats, on the device."""

    pairs: list[tuple[int, int, int]] = field(default_factory=list)  # group, chosen, rejected
    ratios: list[Tensor] = field(default_factory=list)  # (P, 2) each

    def add(
        self, pairs: Iterable[tuple[int, int, int]], logp_N: Tensor, reference_N: Tensor, lengths_S: Tensor,
        pairs_P2: Tensor,
    ) -> None:  # fmt: skip
        # fp64: a log-ratio is a small difference of two sums in the hundreds
        change_N = logp_N.detach().double() - reference_N.double()
        self.pairs += pairs
        self.ratios.append(torch.stack(pair_sums(change_N, lengths_S, pairs_P2, validate=False), dim=-1))

    def extremes(self, data: PreparedData) -> list[list[float]]:
        """[row, place, chosen, rejected] of the step's most and least moved pairs; the one transfer.

        row: the row of the pair files that first held the prompt; place: which of the prompt's pairs, from 0.
        """
        if not self.pairs:
            return []
        moved = torch.cat(self.ratios).tolist()
        found = [[index, 0, *ratios] for index, ratios in enumerate(moved)]
        return [self._named(data, int(index), ratios) for index, _, *ratios in most_and_least(found)]

    def _named(self, data: PreparedData, index: int, ratios: list[float]) -> list[float]:
        group, *answers = self.pairs[index]
        place = data.pairs(group).tolist().index(answers)
        return [data.first_row(group), place, *(round(ratio, 4) for ratio in ratios)]


def most_and_least(found: list[list[float]]) -> list[list[float]]:
    """Those of the largest and of the smallest margins, each pair once, the largest first."""
    ordered = sorted(found, key=lambda entry: (entry[3] - entry[2], entry[:2]))
    return ordered if len(ordered) <= 2 * EXTREMES else ordered[:EXTREMES] + ordered[-EXTREMES:]
