"""The four things asked of Gemini's batch API, and the forms that requests and results have in its files."""

from __future__ import annotations

import base64
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fasttrain_data.annotations.reply import Reply
from fasttrain_data.annotations.request import JudgeRequest, reply_schema, system_instruction
from fasttrain_data.annotations.sdk_genai import GenaiJudge, genai_failure, reply_from_json
from fasttrain_data.calls.failures import CallFailed, failure_of, whole_number
from fasttrain_data.errors import UserError
from fasttrain_data.jsonl import Row

BATCH_ENDED = frozenset(
    {
        "JOB_STATE_SUCCEEDED",
        "JOB_STATE_PARTIALLY_SUCCEEDED",
        "JOB_STATE_FAILED",
        "JOB_STATE_CANCELLED",
        "JOB_STATE_EXPIRED",
    }
)
# google.rpc.Code -> HTTP status, for the errors of single rows
_HTTP_OF_RPC = {3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 13: 500, 14: 503, 16: 401}
_LONGEST_WAIT_S = 60.0
Value = TypeVar("Value")


@dataclass(frozen=True)
class BatchJob:
    """State of a batch; file: the name of its results, if any; error: why it failed, if it did."""

    state: str
    file: str | None
    error: str | None


class _NotThere(UserError):
    """The server does not know what was asked for."""


class BatchApi:
    """Batch calls with retries: each is free, and losing a day of waiting to one 503 is not."""

    def __init__(self, judge: GenaiJudge, attempts: int, backoff_s: float) -> None:
        self._judge, self._attempts, self._backoff_s = judge, attempts, backoff_s
        self._client = judge.client

    def submit(self, model: str, requests: Path, display_name: str) -> str:
        """Upload a file of requests and start a batch; returns the server's name for it.

        Creating is not repeated blindly: a reply that got lost may stand for a batch that is running.
        """
        from google.genai import types

        config = types.UploadFileConfig(mime_type="application/jsonl", display_name=display_name)
        file = self._try(lambda: self._client.files.upload(file=str(requests), config=config))

        named = types.CreateBatchJobConfig(display_name=display_name)
        attempts = itertools.count()

        def create() -> str:
            if next(attempts):
                known = self.names_by_display_name()
                if display_name in known:
                    return known[display_name]
            return str(self._client.batches.create(model=model, src=file.name, config=named).name)

        return self._try(create)

    def get(self, name: str) -> BatchJob:
        """State of a batch; one that the server does not know any more has ended without results."""
        try:
            job = self._try(lambda: self._client.batches.get(name=name))
        except _NotThere:
            self.names_by_display_name()  # a wrong address does not know any batch: that is told instead
            return BatchJob("JOB_STATE_EXPIRED", None, f"the server does not know the batch {name} any more")
        state = str(getattr(job.state, "value", job.state))
        file = job.dest.file_name if job.dest else None
        return BatchJob(state, file, str(job.error.message) if job.error else None)

    def names_by_display_name(self) -> dict[str, str]:
        jobs = self._try(lambda: list(self._client.batches.list(config={"page_size": 100})))
        return {str(job.display_name): str(job.name) for job in jobs if job.display_name}

    def download(self, file: str, target: Path) -> bool:
        """Write a results file to `target`; False if the server does not have it any more."""
        try:
            self._try(lambda: self._client.files.download(file=file, destination=str(target)))
        except _NotThere:
            return False
        return True

    def _try(self, call: Callable[[], Value]) -> Value:
        import httpx2
        from google.genai import errors

        for attempt in range(self._attempts):
            try:
                return call()
            except (errors.APIError, httpx2.HTTPError, ValueError, KeyError) as error:
                failure = genai_failure(error, self._judge.api_key)
                if failure.stop or not failure.retry or attempt == self._attempts - 1:
                    gone = isinstance(error, errors.APIError) and error.code == 404
                    raise (_NotThere if gone else UserError)(
                        f"the batch API refuses: {failure.message}; start again to go on"
                    ) from None
                wait_s = failure.delay_s if failure.delay_s is not None else self._backoff_s * 2**attempt
                time.sleep(min(wait_s, _LONGEST_WAIT_S))
        raise AssertionError("unreachable")


def rest_request(request: JudgeRequest) -> Row:
    """A GenerateContentRequest as the REST API's JSON."""
    parts: list[Row] = [
        {"inlineData": {"mimeType": image.mime_type, "data": base64.b64encode(image.content).decode()}}
        for image in request.images
    ]
    parts += [{"text": text} for text in request.texts()]
    return {
        "contents": [{"role": "user", "parts": parts}],
        "systemInstruction": {"parts": [{"text": system_instruction()}]},
        "generationConfig": {
            "temperature": request.temperature,
            "seed": request.seed,
            "maxOutputTokens": request.max_output_tokens,
            "responseMimeType": "application/json",
            "responseJsonSchema": reply_schema(len(request.answers)),
        },
    }


def read_result(row: Row) -> Reply | CallFailed:
    """One line of a results file."""
    error: Any = row.get("error")
    if error:
        fields = error if isinstance(error, dict) else {"message": error}
        code = whole_number(fields.get("code")) or 500
        failure = failure_of(
            _HTTP_OF_RPC.get(code, code), str(fields.get("message")), fields.get("details") or []
        )
        return CallFailed(failure.status, failure.message)  # a row's error is about that row
    response = row.get("response")
    if response is None:
        return CallFailed("server_error", "the results have neither a response nor an error for this call")
    return reply_from_json(response)
