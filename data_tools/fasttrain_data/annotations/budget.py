"""Money: what was spent, what calls in flight may still cost, and whether one more fits under the cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fasttrain_data.annotations.prices import Price
from fasttrain_data.errors import UserError

# Rough sizes for estimates before the first reply: Gemini's documents give four characters a token; an image is
# taken at the largest default budget they name. Replies in the journal replace these by their own means.
CHARS_PER_TOKEN = 4
IMAGE_TOKENS = 1120


class Priced(Protocol):
    """What the price of a request is reckoned from."""

    @property
    def images(self) -> Sequence[Any]: ...

    @property
    def max_output_tokens(self) -> int: ...

    def prompt_chars(self) -> int: ...

    def likely_output_tokens(self) -> int:
        """A rough guess, before the first reply."""


@dataclass
class Measured:
    """Sums over replies at hand, for estimates."""

    calls: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        self.calls += 1
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens


def estimate_tokens(request: Priced, measured: Measured) -> tuple[int, int]:
    """(prompt, output) tokens that a call will probably take."""
    if measured.calls:
        return measured.prompt_tokens // measured.calls, measured.output_tokens // measured.calls
    prompt = request.prompt_chars() // CHARS_PER_TOKEN + IMAGE_TOKENS * len(request.images)
    return prompt, request.likely_output_tokens()


class Budget:
    """The cap counts everything in the journal, so that starting again does not buy a new one.

    A call is admitted when the most it could cost (a token per character, the full output allowance) fits
    under the cap together with all calls in flight. `spent_usd` includes earlier runs.
    """

    def __init__(self, price: Price | None, cap_usd: float | None, model: str, batch: bool = False) -> None:
        if cap_usd is not None and price is None:
            raise UserError(
                f"--max-cost: wanted a price for {model}, got none for today: give a table with --prices FILE"
            )
        self.price, self.cap_usd, self.batch = price, cap_usd, batch
        self.spent_usd = 0.0
        self.reached = False
        self._reserved_usd: dict[str, float] = {}
        self._reserved_sum_usd = 0.0

    def admit(self, key: str, request: Priced) -> bool:
        """Reserve the most that the call could cost; False if the cap has no room for it now."""
        if self.cap_usd is None or key in self._reserved_usd:
            return True
        most_usd = self.most_of(request)
        if self.spent_usd + self._reserved_sum_usd + most_usd > self.cap_usd:
            self.reached = not self._reserved_usd
            return False
        self.reserve(key, most_usd)
        return True

    def most_of(self, request: Priced) -> float:
        """The most that a call can cost, in US dollars; 0 without a price."""
        if self.price is None:
            return 0.0
        most_prompt = request.prompt_chars() + 2 * IMAGE_TOKENS * len(request.images)
        return self.price.of(most_prompt, request.max_output_tokens, self.batch)

    def reserve(self, key: str, usd: float) -> None:
        self.settle(key, None)
        self._reserved_usd[key] = usd
        self._reserved_sum_usd += usd

    def settle(self, key: str, cost_usd: float | None) -> None:
        """Replace a reservation, if there is one, by what the call did cost."""
        self._reserved_sum_usd -= self._reserved_usd.pop(key, 0.0)
        self.spent_usd += cost_usd or 0.0

    def cost_of(self, usage: dict[str, int]) -> float | None:
        """US dollars of a reply, thinking included; None without a price."""
        if self.price is None:
            return None
        return round(self.price.of(usage["prompt"], usage["output"] + usage["thoughts"], self.batch), 8)
