"""Judge calls with a memory: each request is paid once, whatever is stopped, killed or started again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fasttrain.evaluate.judging.clients import Client, open_client
from fasttrain.evaluate.judging.options import JudgeOptions
from fasttrain.evaluate.judging.request import JudgeRequest
from fasttrain_data.annotations.budget import Budget, Measured, estimate_tokens
from fasttrain_data.annotations.prices import price_of
from fasttrain_data.annotations.reply import Reply, withheld
from fasttrain_data.calls.dispatch import Dispatcher
from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.calls.journal import Journal
from fasttrain_data.errors import UserError
from fasttrain_data.jsonl import Row
from fasttrain_data.progress import Progress
from fasttrain_data.records import now

JOURNAL = "judge.journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What came of a request. text: None exactly when status is not "ok". model_version: as the server reports it."""

    status: str
    text: str | None = None
    detail: str | None = None
    model_version: str | None = None
    created: str | None = None

    @property
    def replied(self) -> bool:
        """Whether the judge had its say, if only with nothing."""
        return self.status in ("ok", "empty")


@dataclass(kw_only=True)
class Forecast:
    """What asking would take. usd: None without a price for the model."""

    calls: int = 0
    calls_in_journal: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    usd: float | None = None
    spent_usd: float = 0.0


class JudgeCalls:
    """Asks what the journal in `folder` does not hold, within rate limits and the cost cap.

    A daily quota or the cap ends a run early: what is left then has the status quota.
    """

    def __init__(self, folder: Path, options: JudgeOptions, client: Client | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.options = options
        self.budget = Budget(price_of(options.model, options.prices), options.max_cost_usd, options.model)
        self.measured = Measured()
        self.versions: Counter[str] = Counter()
        self.replies = 0
        self.stopped: str | None = None
        self._client = client
        self._keep_empty = True  # the journal
        self.journal = Journal(folder / JOURNAL, self._visit)

    def ask(self, requests: Iterable[JudgeRequest]) -> list[Judgment]:
        """One judgment per request, in their order; equal requests share one."""
        requests = list(requests)
        wanted = self._open(requests)
        if wanted and self.stopped is None:
            self._call(wanted)
        judgments = [self._judgment(request) for request in requests]
        self.versions.update(judgment.model_version for judgment in judgments if judgment.model_version)
        return judgments

    def forecast(self, requests: Iterable[JudgeRequest]) -> Forecast:
        """Count calls, tokens and money; nothing is called."""
        requests = list(requests)
        self._keep_empty = False
        wanted = self._open(requests)
        result = Forecast(calls=len(wanted), spent_usd=self.budget.spent_usd)
        result.calls_in_journal = len({request.key for request in requests}) - len(wanted)
        for request in wanted:
            prompt_tokens, output_tokens = estimate_tokens(request, self.measured)
            result.prompt_tokens += prompt_tokens
            result.output_tokens += output_tokens
        if self.budget.price is not None:
            result.usd = self.budget.price.of(result.prompt_tokens, result.output_tokens)
        return result

    @property
    def notes(self) -> set[str]:
        return self._client.notes if self._client else set()

    def close(self) -> None:
        self.journal.close(keep_empty=self._keep_empty)
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> JudgeCalls:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keep_empty = self._keep_empty and kind is None  # a refused key leaves no file behind
        self.close()

    def _open(self, requests: list[JudgeRequest]) -> list[JudgeRequest]:
        """Requests without a lasting entry, each once."""
        by_key = {request.key: request for request in requests}
        return [request for key, request in by_key.items() if not self._is_settled(self.journal.get(key))]

    def _is_settled(self, entry: Row | None) -> bool:
        return entry is not None and entry["status"] not in self.options.retry

    def _call(self, wanted: list[JudgeRequest]) -> None:
        client = self._client = self._client or open_client(self.options)
        progress = Progress(len(wanted), "judge calls", self.options.quiet)

        def work(request: JudgeRequest) -> tuple[Reply, float]:
            started_s = time.monotonic()
            return client.ask(request), time.monotonic() - started_s

        def done(request: JudgeRequest, result: Any) -> None:
            if isinstance(result, CallFailed):
                self._write_failure(request, result)
            else:
                self._write_reply(request, *result)
            progress.add(1, f"{self.budget.spent_usd:.2f} USD" if self.budget.price else "")

        dispatcher = Dispatcher(
            work,
            done,
            self.options.limits,
            tokens=lambda request: sum(estimate_tokens(request, self.measured)),
            admit=lambda request: self.budget.admit(request.key, request),
        )
        try:
            dispatcher.run(iter(wanted))
        finally:
            progress.close()
            self.journal.sync()
        if dispatcher.stopped is not None:
            if dispatcher.stopped.fatal:
                raise UserError(f"the judge's server refuses: {dispatcher.stopped.message}")
            self.stopped = dispatcher.stopped.message
        elif self.budget.reached:
            self.stopped = f"--max-cost {self.options.max_cost_usd} USD is reached"

    def _write_reply(self, request: JudgeRequest, reply: Reply, latency_s: float) -> None:
        verdict = withheld(reply)
        status, detail = (verdict.status, verdict.detail) if verdict else ("ok", None)
        if status == "ok" and not (reply.text or "").strip():
            cut = reply.finish_reason == "MAX_TOKENS"
            status, detail = (
                ("truncated" if cut else "empty"),
                f"no text (finish reason {reply.finish_reason})",
            )
        cost_usd = self.budget.cost_of(reply.usage)
        entry = {
            "about": request.about,
            "model": request.model,
            "created": now(),
            "status": status,
            "detail": detail,
            "text": reply.text if status == "ok" else None,
            "finish_reason": reply.finish_reason,
            "model_version": reply.model_version,
            "usage": reply.usage,
            "cost_usd": cost_usd,
            "latency_s": round(latency_s, 3),
            "raw": reply.raw,
        }
        self.journal.append(request.key, {key: value for key, value in entry.items() if value is not None})
        self.budget.settle(request.key, cost_usd)
        self.measured.add(reply.usage["prompt"], reply.usage["output"] + reply.usage["thoughts"])
        self.replies += 1

    def _write_failure(self, request: JudgeRequest, failure: CallFailed) -> None:
        if not failure.fatal:  # a wrong key says nothing about this request
            entry = {"about": request.about, "model": request.model, "created": now()}
            self.journal.append(
                request.key, {**entry, "status": failure.status, "detail": failure.message[:500]}
            )
        self.budget.settle(request.key, None)

    def _judgment(self, request: JudgeRequest) -> Judgment:
        entry = self.journal.get(request.key)
        if entry is None:
            return Judgment(status="quota", detail=self.stopped or "the call was not made")
        names = ("status", "text", "detail", "model_version", "created")
        return Judgment(**{name: entry[name] for name in names if name in entry})

    def _visit(self, entry: Row) -> None:
        self.budget.settle(entry["key"], entry.get("cost_usd"))
        if entry.get("model") == self.options.model and (usage := entry.get("usage")):
            self.measured.add(usage["prompt"], usage["output"] + usage["thoughts"])
