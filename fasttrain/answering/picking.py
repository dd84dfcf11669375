"""One token per row: the likeliest, or a sample that depends on nothing but the row's own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TokenPicker:
    """Chooses one token per row. A row with temperature draws from a generator of its own.

    Also a logits processor for `generate` told to be greedy: the likeliest token of what it returns is the sample.
    """

    def __init__(
        self, temperatures: Sequence[float], seeds: Sequence[int], top_p: float, device: torch.device
    ) -> None:
        self.temperatures, self.top_p = list(temperatures), top_p
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self.temperatures = [self.temperatures[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]

    def pick(self, logit_SV: Tensor) -> Tensor:
        """Token ids (S,) for logits (S, V)."""
        return self(None, logit_SV).argmax(-1)

    def __call__(self, input_ids: Any, logit_SV: Tensor) -> Tensor:
        """Logits whose argmax is the choice: argmax(log p + Gumbel noise) is distributed as p."""
        rows = [row for row, temperature in enumerate(self.temperatures) if temperature > 0]
        if not rows:
            return logit_SV
        result_SV = logit_SV.float().clone()
        for row in rows:
            logit_V = self._nucleus(result_SV[row] / self.temperatures[row])
            noise_V = torch.empty_like(logit_V).exponential_(generator=self._generators[row])
            result_SV[row] = logit_V - noise_V.log()
        return result_SV

    def _nucleus(self, logit_V: Tensor) -> Tensor:
        """Tokens outside the smallest set that holds probability top_p get -inf."""
        if self.top_p >= 1:
            return logit_V
        sorted_V, index_V = logit_V.sort(descending=True)
        probability_V = sorted_V.softmax(-1)
        outside_V = probability_V.cumsum(-1) - probability_V >= self.top_p
        return logit_V.masked_fill(torch.zeros_like(outside_V).scatter(0, index_V, outside_V), float("-inf"))
