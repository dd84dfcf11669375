"""Everything that decides how completions are annotated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fasttrain_data.annotations.judge import Sdk
from fasttrain_data.calls.dispatch import CallLimits
from fasttrain_data.errors import UserError
from fasttrain_data.records import TRANSIENT


@dataclass(frozen=True, kw_only=True)
class AnnotateSettings:
    """votes: calls per prompt, each in another order; scores are their medians (the lower one of two).

    recheck: share of the prompts that get one more call in another order, for agreement only.
    mode: all answers of a prompt in one call, or one call per answer. retry: statuses that a rerun tries again.
    max_cost_usd: no call starts that could take the journal's total beyond it.
    """

    model: str
    sdk: Sdk = "google-genai"
    votes: int = 1
    recheck: float = 0.0
    mode: Literal["together", "single"] = "together"
    temperature: float = 0.0
    seed: int = 0
    max_output_tokens: int = 8192
    retry: frozenset[str] = TRANSIENT
    allow_mixed_versions: bool = False
    max_cost_usd: float | None = None
    prices: Path | None = None
    image_root: Path | None = None
    batch: bool = False
    poll_s: float = 30.0
    limits: CallLimits = field(default_factory=CallLimits)

    def __post_init__(self) -> None:
        for name, got, right, wanted in (
            ("--model", self.model, bool(self.model.strip()), "a model name"),
            ("--votes", self.votes, self.votes >= 1, "at least 1"),
            ("--recheck", self.recheck, 0 <= self.recheck <= 1, "a share from 0 to 1"),
            ("--in-flight", self.limits.in_flight, self.limits.in_flight >= 1, "at least 1"),
            ("--max-output-tokens", self.max_output_tokens, self.max_output_tokens >= 64, "at least 64"),
        ):
            if not right:
                raise UserError(f"{name}: wanted {wanted}, got {got!r}")
        if self.batch and self.sdk != "google-genai":
            raise UserError("--batch: google-generativeai has no batch API; use --sdk google-genai")
