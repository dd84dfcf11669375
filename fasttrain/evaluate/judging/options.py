"""How a judge is reached and what it may cost: one frozen object, and the command-line options that make it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import click

from fasttrain.errors import UserError
from fasttrain_data.calls.chat_server import chat_url
from fasttrain_data.calls.dispatch import CallLimits
from fasttrain_data.commands.options import SECONDS, Number
from fasttrain_data.records import TRANSIENT, Status

Api = Literal["gemini", "openai"]
OPENAI_SERVER = "https://api.openai.com/v1"
GEMINI_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """model: as the API names it; there is no default. base_url: None is the API's own server.

    temperature, max_output_tokens: None is the benchmark's own. baseline: answers to compare with, MT-Bench's pairwise
    mode or AlpacaEval's reference outputs. prompt: a file with the judge's prompt, for benchmarks that ship none.
    partial: score only questions that have an answer. limit: judge the first so many questions. retry: statuses of earlier calls that are tried again.
    """

    model: str
    api: Api = "gemini"
    base_url: str | None = None
    api_version: str | None = None
    timeout_s: float = 120.0
    temperature: float | None = None
    max_output_tokens: int | None = None
    limits: CallLimits = field(default_factory=CallLimits)
    retry: frozenset[str] = TRANSIENT
    max_cost_usd: float | None = None
    prices: Path | None = None
    baseline: Path | None = None
    prompt: Path | None = None
    partial: bool = False
    limit: int | None = None
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, got, right, wanted in (
            ("--judge", self.model, bool(self.model.strip()), "a model name"),
            ("--judge-api", self.api, self.api in get_args(Api), " or ".join(get_args(Api))),
            ("--in-flight", self.limits.in_flight, self.limits.in_flight >= 1, "at least 1"),
            ("--judge-tokens", self.max_output_tokens, (self.max_output_tokens or 1) >= 1, "at least 1"),
            ("--judge-temperature", self.temperature, 0 <= (self.temperature or 0) <= 2, "0 to 2"),
        ):
            if not right:
                raise UserError(f"{name}: wanted {wanted}, got {got!r}")
        known = [status for status in get_args(Status) if status != "ok"]
        for status in self.retry:
            if status not in known:
                raise UserError(f"--retry: wanted one of {', '.join(known)}, got {status!r}")

    @property
    def server(self) -> str:
        """API and address of a server that is not the API's own, else nothing: what a reply depends on beside the model."""
        variable = "GOOGLE_GEMINI_BASE_URL" if self.api == "gemini" else "OPENAI_BASE_URL"
        given = self.base_url or os.environ.get(variable)
        if not given:
            return ""
        if self.api == "gemini":
            return f"gemini {given.rstrip('/')}"
        url = chat_url(given, "--judge-url")
        return "" if url == chat_url(OPENAI_SERVER) else f"openai {url}"

    def tokens(self, official: int) -> int:
        """The output allowance: what is asked for, else the benchmark's own; Gemini's thoughts need room in it."""
        return self.max_output_tokens or (GEMINI_TOKENS if self.api == "gemini" else official)

    def heat(self, official: float) -> float:
        return official if self.temperature is None else self.temperature


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option("--judge", "judge_model", metavar="MODEL", help="Judge model, as its API names it. No default: models come and go."),
    click.option("--judge-api", type=click.Choice(get_args(Api)), default="gemini", show_default=True, help="Key from GEMINI_API_KEY or GOOGLE_API_KEY, or from OPENAI_API_KEY where the server wants one."),
    click.option("--judge-url", metavar="URL", help="Another server. Default: $GOOGLE_GEMINI_BASE_URL or $OPENAI_BASE_URL, else the API's own."),
    click.option("--judge-api-version", metavar="VERSION", help="Gemini only; default: the SDK's own."),
    click.option("--judge-temperature", type=Number(0, 2), help="Default: the benchmark's own."),
    click.option("--judge-tokens", type=click.IntRange(1), help="Output tokens at most. Default: the benchmark's own; 8192 for Gemini, whose thoughts count."),
    click.option("--judge-prompt", type=_FILE, help="The judge's prompt, for MM-Vet and AlpacaEval. Default: --data's, else ours."),
    click.option("--baseline", type=_FILE, help="Answers to compare with: MT-Bench's pairwise mode, AlpacaEval's reference outputs."),
    click.option("--partial", is_flag=True, help="Score the answers there are; default: every question wants one."),
    click.option("--rpm", type=Number(0, min_open=True), help="Judge calls a minute, at most."),
    click.option("--tpm", type=click.IntRange(1), help="Judge tokens a minute, at most, by estimate."),
    click.option("--in-flight", type=click.IntRange(1), default=8, show_default=True, help="Judge calls at the same time, at most."),
    click.option("--judge-timeout", type=SECONDS, default=120.0, show_default=True, help="Seconds."),
    click.option("--attempts", type=click.IntRange(1), default=5, show_default=True, help="Per judge call and run."),
    click.option("--backoff", type=Number(0), default=1.0, show_default=True, help="First wait in seconds, doubled; a server that names a delay is obeyed."),
    click.option("--retry", multiple=True, metavar="STATUS", help=f"Also ask again where this was the outcome, besides {', '.join(sorted(TRANSIENT))}. Repeatable."),
    click.option("--max-cost", type=Number(0), metavar="USD", help="No judge call that could take the journal's total beyond this."),
    click.option("--prices", type=_FILE, help="Price table; default: the one of fasttrain-data."),
    click.option("--judge-seed", type=int, default=0, show_default=True, help="Decides AlpacaEval's order of answers."),
    click.option("--judge-dry-run", is_flag=True, help="Print judge calls, tokens and money; ask nothing."),
)  # fmt: skip


def judge_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the judge's options to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_judge_options(given: dict[str, Any]) -> tuple[JudgeOptions | None, bool]:
    """Take the judge's options out of a command's arguments; (None without --judge, whether --judge-dry-run)."""
    limits = CallLimits(
        rpm=given.pop("rpm"),
        tpm=given.pop("tpm"),
        in_flight=given.pop("in_flight"),
        attempts=given.pop("attempts"),
        backoff_s=given.pop("backoff"),
    )
    model, dry_run = given.pop("judge_model"), given.pop("judge_dry_run")
    values = {
        "api": given.pop("judge_api"),
        "base_url": given.pop("judge_url"),
        "api_version": given.pop("judge_api_version"),
        "timeout_s": given.pop("judge_timeout"),
        "temperature": given.pop("judge_temperature"),
        "max_output_tokens": given.pop("judge_tokens"),
        "prompt": given.pop("judge_prompt"),
        "baseline": given.pop("baseline"),
        "partial": given.pop("partial"),
        "retry": TRANSIENT | frozenset(given.pop("retry")),
        "max_cost_usd": given.pop("max_cost"),
        "prices": given.pop("prices"),
        "seed": given.pop("judge_seed"),
    }
    if model is None:
        return None, dry_run
    return JudgeOptions(model=model, limits=limits, **values), dry_run
