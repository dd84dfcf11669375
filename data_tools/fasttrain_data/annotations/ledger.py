"""Replies and failures on their way into the journal, and what the journal already knows."""

from __future__ import annotations

from dataclasses import dataclass

from fasttrain_data.annotations.budget import Budget, Measured
from fasttrain_data.annotations.plan import PlannedCall
from fasttrain_data.annotations.reply import Reply, judge_reply
from fasttrain_data.annotations.settings import AnnotateSettings
from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.calls.journal import Journal
from fasttrain_data.jsonl import Row
from fasttrain_data.records import now

# Journal status of a call that is in a batch whose results are not in yet; never written to an annotation.
SUBMITTED = "submitted"


class MixedVersions(Exception):
    """The server answers with another model version than the replies at hand."""

    def __init__(self, versions: set[str]) -> None:
        super().__init__(", ".join(sorted(versions)))


@dataclass
class Totals:
    """Calls of this run by outcome, and tokens and money of them."""

    replies: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0


class Ledger:
    """Writes outcomes to the journal and keeps money, versions and means."""

    def __init__(self, settings: AnnotateSettings, budget: Budget) -> None:
        self.settings, self.budget = settings, budget
        self.measured = Measured()
        self.totals = Totals()
        self.versions: set[str] = set()
        self.live_batches: set[str] = set()
        self.journal: Journal | None = None

    def visit(self, entry: Row) -> None:
        """Take in an entry of an earlier run; a reply that had no price then counts at today's."""
        cost_usd, usage = entry.get("cost_usd"), entry.get("usage")
        if cost_usd is None and usage and entry.get("model") == self.settings.model:
            cost_usd = self.budget.cost_of(usage)
        self.budget.settle(entry["key"], cost_usd)
        if entry["status"] == SUBMITTED and entry["batch"] in self.live_batches:
            self.budget.reserve(entry["key"], entry.get("reserved_usd") or 0.0)
        if entry.get("model") != self.settings.model:
            return
        if usage:
            self.measured.add(usage["prompt"], usage["output"] + usage["thoughts"])
        if entry.get("model_version"):
            self.versions.add(entry["model_version"])

    def check_versions(self) -> None:
        """MixedVersions if replies of several model versions would meet in one file."""
        if len(self.versions) > 1 and not self.settings.allow_mixed_versions:
            raise MixedVersions(self.versions)

    def is_settled(self, entry: Row | None) -> bool:
        """Whether an entry stands, or waits in a live batch; other statuses are tried again."""
        if entry is None:
            return False
        if entry["status"] == SUBMITTED:
            return entry["batch"] in self.live_batches
        return entry["status"] not in self.settings.retry

    def write_submitted(self, call: PlannedCall, batch: str) -> None:
        """Note that a call is about to go out in a batch."""
        most_usd = self.budget.most_of(call.request)
        about = self._about(about_call(call))
        self._append({**about, "status": SUBMITTED, "batch": batch, "reserved_usd": most_usd})

    def write_reply(self, call: Row, reply: Reply, latency_s: float | None = None) -> Row:
        """Judge a paid reply and put it into the journal, where it goes whatever becomes of its judgement.

        call: as `about_call` tells it.
        """
        cost_usd = self.budget.cost_of(reply.usage)
        entry = {
            **self._about(call),
            "status": "malformed",
            "detail": "the reply could not be judged",
            "scores": None,
            "reasons": None,
            "model_version": reply.model_version,
            "usage": reply.usage,
            "cost_usd": cost_usd,
            "latency_s": None if latency_s is None else round(latency_s, 3),
            "raw": reply.raw,
        }
        try:
            verdict = judge_reply(reply, len(call["order"]))
            entry["status"], entry["detail"] = verdict.status, verdict.detail
            entry["scores"] = [list(row) for row in verdict.scores] or None
            entry["reasons"] = list(verdict.reasons) or None
        finally:
            self._append(entry)
        self.budget.settle(call["key"], cost_usd)
        output = reply.usage["output"] + reply.usage["thoughts"]
        self.measured.add(reply.usage["prompt"], output)
        self.totals.replies += 1
        self.totals.prompt_tokens += reply.usage["prompt"]
        self.totals.output_tokens += output
        self.totals.usd += cost_usd or 0.0
        if reply.model_version:
            self.versions.add(reply.model_version)
        return entry

    def write_failure(self, call: Row, failure: CallFailed) -> Row:
        """Note a call that stayed without reply; it costs nothing and may be tried again."""
        entry = {**self._about(call), "status": failure.status, "detail": failure.message[:500]}
        if not failure.fatal:  # a wrong key says nothing about this call
            self._append(entry)
        self.budget.settle(call["key"], None)
        self.totals.failures += 1
        return entry

    def _about(self, call: Row) -> Row:
        return {**call, "model": self.settings.model, "created": now()}

    def _append(self, entry: Row) -> None:
        assert self.journal is not None
        self.journal.append(entry["key"], {key: value for key, value in entry.items() if value is not None})


ABOUT_CALL = ("key", "question_id", "vote", "recheck", "order", "order_seed")


def about_call(call: PlannedCall) -> Row:
    """What a call is, without its texts and images."""
    return {field: getattr(call, field) for field in ABOUT_CALL} | {"order": list(call.order)}
