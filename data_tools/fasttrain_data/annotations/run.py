"""completions.jsonl -> annotations.jsonl: make the calls the journal does not have, then write the file from it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain_data.annotations.assemble import assemble, assemble_failed
from fasttrain_data.annotations.batch import BatchRun, BatchState
from fasttrain_data.annotations.budget import Budget, estimate_tokens
from fasttrain_data.annotations.judge import Judge
from fasttrain_data.annotations.ledger import SUBMITTED, Ledger, MixedVersions, Totals, about_call
from fasttrain_data.annotations.plan import PlannedCall, plan_calls
from fasttrain_data.annotations.prices import Price, price_of
from fasttrain_data.annotations.prompts import ImageReader, Prompts
from fasttrain_data.annotations.reply import Reply
from fasttrain_data.annotations.settings import AnnotateSettings
from fasttrain_data.calls.dispatch import Dispatcher
from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.calls.journal import Journal, journal_path
from fasttrain_data.errors import UserError
from fasttrain_data.image_files import BadImage, ImageNames
from fasttrain_data.jsonl import check_output, whole_rows
from fasttrain_data.progress import Progress
from fasttrain_data.spill import SeenKeys


@dataclass
class AnnotateResult:
    """statuses: how many prompts ended with which; details: what was said of the first with each.

    spent_usd: the whole journal; totals: this run; price: None where the table has none, then neither's money is known.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    price: Price | None = None
    spent_usd: float = 0.0
    stopped: str | None = None
    flags: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


@dataclass
class Forecast:
    """What a run would do, from --dry-run."""

    prompts: int = 0
    calls: int = 0
    calls_in_journal: int = 0
    bad_images: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    price: Price | None = None
    usd: float | None = None
    spent_usd: float = 0.0
    measured: bool = False


def annotate(
    completions: Path,
    output: Path,
    settings: AnnotateSettings,
    judge: Judge,
    *,
    quiet: bool = False,
) -> AnnotateResult:
    """Annotate every prompt of `completions` and write `output`, one record per prompt in input order.

    Calls already in `output`'s journal are not made again. UserError for mistakes: files, settings, a key or
    model the server does not accept, mixed model versions. A daily quota or the cost cap ends the run early;
    prompts left without reply then have status quota.
    """
    run = _Run(completions, output, settings)
    with contextlib.closing(run.prompts), run.journal:
        try:
            if settings.batch:
                run.call_in_batches(judge, quiet)
            else:
                run.call(judge, quiet)
            return run.write()
        except MixedVersions as mixed:
            raise UserError(
                f"{output}: wanted replies of one model version, got {mixed}; pass --allow-mixed-versions to keep "
                "them together, or annotate to another file"
            ) from None


def forecast(completions: Path, output: Path, settings: AnnotateSettings) -> Forecast:
    """Count calls, tokens and money without making a call."""
    run = _Run(completions, output, settings)
    try:
        result = Forecast(prompts=len(run.prompts), price=run.ledger.budget.price)
        result.measured = run.ledger.measured.calls > 0
        result.spent_usd = run.ledger.budget.spent_usd
        for call in run.open_calls():
            prompt_tokens, output_tokens = estimate_tokens(call.request, run.ledger.measured)
            result.calls += 1
            result.prompt_tokens += prompt_tokens
            result.output_tokens += output_tokens
        result.calls_in_journal, result.bad_images = run.settled, run.bad_images
        if result.price:
            result.usd = result.price.of(result.prompt_tokens, result.output_tokens, settings.batch)
        return result
    finally:
        run.journal.close(keep_empty=False)
        run.prompts.close()


class _Run:
    """The state of one run: prompts, journal, ledger."""

    def __init__(self, completions: Path, output: Path, settings: AnnotateSettings) -> None:
        check_output(output, completions)
        self.output, self.settings = output, settings
        self.names = ImageNames.between(completions, output, settings.image_root)
        self.read_images = ImageReader(self.names.in_root)
        price = price_of(settings.model, settings.prices)
        self.ledger = Ledger(settings, Budget(price, settings.max_cost_usd, settings.model, settings.batch))
        self.ledger.live_batches.update(BatchState(output).batches)
        self.prompts = Prompts(completions)
        self.journal = Journal(journal_path(output), self.ledger.visit)
        self.ledger.journal = self.journal
        self.settled = self.bad_images = 0
        self.stopped: str | None = None

    def open_calls(self) -> Iterator[PlannedCall]:
        """Calls that are still to be made, prompt by prompt; equal calls once."""
        asked = SeenKeys()
        for prompt in self.prompts:
            try:
                planned = plan_calls(prompt, self.settings, self.read_images)
            except BadImage:
                self.bad_images += 1
                continue
            for call in planned:
                if self.ledger.is_settled(self.journal.get(call.key)):
                    self.settled += 1
                elif asked.add(call.key):
                    yield call
        asked.close()

    def call(self, judge: Judge, quiet: bool) -> None:
        """Make the open calls within the limits."""
        if self.ledger.live_batches:
            raise UserError(
                f"{self.output}: {len(self.ledger.live_batches)} batches are under way: go on with --batch"
            )
        self.ledger.check_versions()
        votes = self.settings.votes
        total = len(self.prompts) * votes if self.settings.mode == "together" else None
        progress = Progress(total, "calls", quiet)

        def work(call: PlannedCall) -> tuple[Reply, float]:
            started_s = time.monotonic()
            return judge.ask(call.request), time.monotonic() - started_s

        def done(call: PlannedCall, result: Any) -> None:
            if isinstance(result, CallFailed):
                self.ledger.write_failure(about_call(call), result)
            else:
                self.ledger.write_reply(about_call(call), *result)
            progress.add(1, f"{self.ledger.budget.spent_usd:.2f} USD" if self.ledger.budget.price else "")
            self.ledger.check_versions()

        dispatcher = Dispatcher(
            work,
            done,
            self.settings.limits,
            tokens=lambda call: sum(estimate_tokens(call.request, self.ledger.measured)),
            admit=lambda call: self.ledger.budget.admit(call.key, call.request),
        )
        try:
            dispatcher.run(self.open_calls())
        finally:
            progress.close()
            self.journal.sync()
        if dispatcher.stopped is not None:
            if dispatcher.stopped.fatal:
                raise UserError(f"the server refuses: {dispatcher.stopped.message}")
            self.stopped = dispatcher.stopped.message
        elif self.ledger.budget.reached:
            self.stopped = f"--max-cost {self.settings.max_cost_usd} USD is reached"

    def call_in_batches(self, judge: Judge, quiet: bool) -> None:
        """Send the open calls through the batch API and wait for the results."""
        from fasttrain_data.annotations.batch_api import BatchApi
        from fasttrain_data.annotations.sdk_genai import GenaiJudge

        if not isinstance(judge, GenaiJudge):
            raise UserError("--batch: wanted the judge of google-genai")
        self.ledger.check_versions()
        limits = self.settings.limits
        api = BatchApi(judge, limits.attempts, limits.backoff_s)
        batches = BatchRun(
            self.open_calls, self.ledger, api, self.output, poll_s=self.settings.poll_s, quiet=quiet
        )
        self.stopped = batches.run()

    def write(self) -> AnnotateResult:
        """Write the output from the journal, reading the prompts once more."""
        price = self.ledger.budget.price
        result = AnnotateResult(totals=self.ledger.totals, price=price, stopped=self.stopped)
        with whole_rows(self.output) as write:
            for prompt in self.prompts:
                images = [self.names.written(name) for name in prompt.images]
                try:
                    planned = plan_calls(prompt, self.settings, self.read_images)
                except BadImage as problem:
                    record = assemble_failed(prompt, images, "bad_image", str(problem), self.settings)
                else:
                    entries = [self._entry(call) for call in planned]
                    record = assemble(prompt, images, entries, self.settings)
                write(record.row())
                result.statuses[record.status] += 1
                result.details.setdefault(record.status, record.detail or "")
                result.flags.update(record.flags)
        result.spent_usd = self.ledger.budget.spent_usd
        if note := self.names.note(self.output):
            result.notes.append(note)
        return result

    def _entry(self, call: PlannedCall) -> dict[str, Any]:
        entry = self.journal.get(call.key)
        if entry is None or entry["status"] == SUBMITTED:
            entry = {"status": "quota", "detail": self.stopped or "the call was not made"}
        return {**entry, **about_call(call)}
