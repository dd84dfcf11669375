"""One run of a study: what distinguishes it, and its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Method = Literal["dpo", "sft", "rejection", "steerlm"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """pairs: how many are used, None for all. flip: share of pairs whose labels are swapped. beta: None for the recipe's."""

    method: Method
    model: str
    answers: str
    pairs: int | None = None
    flip: float = 0.0
    beta: float | None = None
    first_model: str = field(default="", compare=False)
    first_answers: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """A folder name that says what differs from the study's first model, its answers, all pairs and no noise."""
        parts: list[str] = [self.method]
        if self.model != self.first_model:
            parts.append(self.model)
        if self.answers != self.first_answers:
            parts.append(f"from-{self.answers}")
        if self.pairs is not None:
            parts.append(f"{self.pairs}pairs")
        if self.flip:
            parts.append(f"flip{100 * self.flip:g}")
        if self.beta is not None:
            parts.append(f"beta{self.beta:g}")
        return "-".join(parts)

    @property
    def is_plain(self) -> bool:
        """Nothing but the method distinguishes it."""
        return self.pairs is None and not self.flip and self.beta is None

    @property
    def command(self) -> str:
        return "dpo" if self.method == "dpo" else "sft"
