"""Annotation through Gemini's batch API: half price, hours instead of seconds, and resumable at every step.

A batch gets its name before anything is sent. The name stands in the state file and, with every call of the
batch, in the journal; the server keeps it as the display name. Whatever moment the process dies at, the next
one finds the batch by its name, or learns that it was never made, and no call goes out twice.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from fasttrain_data.annotations.batch_api import BATCH_ENDED, BatchApi, BatchJob, read_result, rest_request
from fasttrain_data.annotations.ledger import ABOUT_CALL, Ledger
from fasttrain_data.annotations.plan import PlannedCall
from fasttrain_data.annotations.reply import Reply
from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.jsonl import Row, parse_line, write_text
from fasttrain_data.progress import Progress
from fasttrain_data.spill import SeenKeys

# The API takes input files of 2 GB.
MAX_FILE_BYTES = 1_500_000_000
MAX_BATCH_CALLS = 50_000


class BatchState:
    """Live batches by our name: the server's name, or None while we do not know whether it exists."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.stem}.batches.json")
        self.batches: dict[str, str | None] = {}
        if self.path.exists():
            try:
                self.batches = dict(json.loads(self.path.read_text(encoding="utf-8"))["batches"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path}: wanted the state of our batches, got {error}") from None

    def save(self) -> None:
        if self.batches:
            write_text(self.path, json.dumps({"batches": self.batches}, indent=1) + "\n")
        else:
            self.path.unlink(missing_ok=True)


class BatchRun:
    """Submits open calls in batches, waits, and brings results into the journal."""

    def __init__(
        self,
        open_calls: Callable[[], Iterator[PlannedCall]],
        ledger: Ledger,
        api: BatchApi,
        output: Path,
        *,
        poll_s: float,
        quiet: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._open_calls, self._ledger, self._api, self._output = open_calls, ledger, api, output
        self._poll_s, self._quiet, self._sleep = poll_s, quiet, sleep
        self._state = BatchState(output)
        self._settled = SeenKeys()  # not sent again by this run

    def run(self) -> str | None:
        """Until no call is open; a reason if money ran out first."""
        self._find_lost()
        while True:
            self._collect_all()
            self._ledger.check_versions()
            self._submit_all()
            if not self._state.batches:
                cap = self._ledger.budget.cap_usd
                return f"--max-cost {cap} USD is reached" if self._ledger.budget.reached else None

    def _find_lost(self) -> None:
        """Batches whose creation we did not live to see: adopt those that the server has, forget the others."""
        lost = [name for name, batch in self._state.batches.items() if batch is None]
        if lost:
            known = self._api.names_by_display_name()
            for name in lost:
                if name in known:
                    self._state.batches[name] = known[name]
                else:
                    del self._state.batches[name]
                    self._ledger.live_batches.discard(name)
            self._state.save()

    def _submit_all(self) -> None:
        calls = (call for call in self._open_calls() if call.key not in self._settled)
        while self._submit(calls):
            pass

    def _submit(self, calls: Iterator[PlannedCall]) -> bool:
        """Send one batch of the next calls; True if it is full and there may be more."""
        name = f"fasttrain-{uuid.uuid4().hex[:20]}"
        requests = self._output.with_name(f".{self._output.stem}.{name}.requests.jsonl")
        self._state.batches[name] = None
        self._state.save()
        self._ledger.live_batches.add(name)
        count, full = 0, False
        try:
            with requests.open("w", encoding="utf-8") as file:
                for call in calls:
                    if not self._ledger.budget.admit(call.key, call.request):
                        break
                    self._ledger.write_submitted(call, name)
                    file.write(json.dumps({"key": call.key, "request": rest_request(call.request)}) + "\n")
                    count += 1
                    full = count >= MAX_BATCH_CALLS or file.tell() >= MAX_FILE_BYTES
                    if full:
                        break
            if count:
                self._state.batches[name] = self._api.submit(self._ledger.settings.model, requests, name)
            else:
                del self._state.batches[name]
            self._state.save()
        finally:
            requests.unlink(missing_ok=True)
        return full

    def _collect_all(self) -> None:
        """Wait for all live batches and take in their results, each when it is done."""
        with contextlib.closing(Progress(len(self._state.batches), "batches", self._quiet)) as progress:
            while self._state.batches:
                for name, batch in list(self._state.batches.items()):
                    assert batch is not None
                    job = self._api.get(batch)
                    if job.state in BATCH_ENDED:
                        self._take(name, job)
                        del self._state.batches[name]
                        self._ledger.live_batches.discard(name)
                        self._state.save()
                        progress.add()
                if self._state.batches:
                    self._sleep(self._poll_s)

    def _take(self, name: str, job: BatchJob) -> None:
        """Write every call of an ended batch to the journal: its reply, or what went wrong."""
        results = self._output.with_name(f".{self._output.stem}.{name}.results.jsonl")
        problem = job.error or f"the batch ended as {job.state} without this call's result"
        self._ledger.live_batches.discard(name)  # its calls are open again until they are settled below
        try:
            results.touch()
            if job.file is not None and not self._api.download(job.file, results):
                results.write_bytes(b"")
                problem = f"the server does not have the batch's results {job.file} any more"
            with results.open("rb") as lines:
                for line in lines:
                    self._take_line(name, line)
            for call in self._open_calls():
                if (entry := self._waiting(call.key, name)) is not None:
                    self._settle(entry, CallFailed("server_error", problem))
        finally:
            results.unlink(missing_ok=True)

    def _take_line(self, name: str, line: bytes) -> None:
        """A result into the journal, though its call be planned no more: it is paid for.

        A damaged line, or one of a call that is not ours, must not keep the other results out.
        """
        try:
            row = parse_line(line, name, "results")
            entry = self._waiting(row["key"], name)
        except (BadRow, KeyError, TypeError, ValueError):
            return
        if entry is None:
            return
        if entry["model"] != self._ledger.settings.model:
            raise UserError(
                f"--model: wanted {entry['model']}, of which a batch is under way: finish it first"
            )
        self._settle(entry, read_result(row))

    def _settle(self, submitted: Row, result: Reply | CallFailed) -> None:
        # A reply of a status in --retry leaves its call open as much as a failure does.
        self._settled.add(submitted["key"])
        about = {field: submitted[field] for field in ABOUT_CALL}
        if isinstance(result, CallFailed):
            self._ledger.write_failure(about, result)
        else:
            self._ledger.write_reply(about, result)

    def _waiting(self, key: str, name: str) -> Row | None:
        """The journal's entry of a call that waits for the results of this batch."""
        assert self._ledger.journal is not None
        entry = self._ledger.journal.get(key)
        return entry if entry is not None and entry.get("batch") == name else None
