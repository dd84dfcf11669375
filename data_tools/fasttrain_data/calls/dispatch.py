"""Many calls in flight, one thread that decides: starts them within the limits, retries, and hands back results."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.calls.limits import Limiter

JobType = TypeVar("JobType")
_LONGEST_BACKOFF_S = 60.0
# Timers overflow at some length; whoever wakes up looks again how long there is to wait.
_LONGEST_NAP_S = 3600.0
# A server that says when to come back is believed this many times as often as one that does not.
_PATIENCE_WHEN_TOLD = 4


@dataclass(frozen=True, kw_only=True)
class CallLimits:
    """rpm, tpm: None is unlimited. attempts: calls made for one job at most. backoff_s: the first wait, doubled."""

    rpm: float | None = None
    tpm: int | None = None
    in_flight: int = 8
    attempts: int = 5
    backoff_s: float = 1.0


@dataclass(order=True)
class _Waiting(Generic[JobType]):
    ready_s: float
    number: int
    job: JobType = field(compare=False)
    attempt: int = field(compare=False, default=1)


class Dispatcher(Generic[JobType]):
    """Runs `work(job)` in threads and calls `done(job, result)` in the caller's thread.

    The result is what `work` returned, or the CallFailed that outlived all attempts. Jobs are pulled from their
    iterator as they can start, so that a million of them need no memory. `tokens(job)` is the estimate that
    `tpm` is held to. A job that `admit` refuses waits for calls in flight and retries to end, and when there are
    none ends the run. After a 429 everything waits as long as the server said and fewer calls run at once;
    replies bring the number back up.
    """

    def __init__(
        self,
        work: Callable[[JobType], Any],
        done: Callable[[JobType, Any], None],
        limits: CallLimits,
        *,
        tokens: Callable[[JobType], int] = lambda job: 0,
        admit: Callable[[JobType], bool] = lambda job: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work, self._done, self._limits, self._tokens, self._clock = work, done, limits, tokens, clock
        self._admit = admit
        self._limiter = Limiter(limits.rpm, limits.tpm)
        self._finished: queue.Queue[tuple[_Waiting[JobType], Any]] = queue.Queue()
        self._waiting: list[_Waiting[JobType]] = []
        self._running = 0
        self._width = float(limits.in_flight)
        self._numbers = itertools.count()
        self._jitter = random.Random(0)
        self._stopping = threading.Event()
        self._interrupted = False
        self._told_until_s = 0.0
        self.stopped: CallFailed | None = None

    def stop(self) -> None:
        """Start nothing more; calls in flight are waited for."""
        self._stopping.set()

    def run(self, jobs: Iterator[JobType]) -> None:
        """Work through `jobs`. `stopped` tells afterwards which failure, if any, ended it early.

        When the caller is interrupted, calls in flight are waited for and handed to `done` before the
        interruption goes on: they are paid for. Interrupting again changes nothing about that.
        """
        try:
            with ThreadPoolExecutor(self._limits.in_flight, thread_name_prefix="call") as pool:
                self._run(jobs, pool)
        finally:
            # What came after a second interruption, while the pool waited for its threads.
            while not self._finished.empty():
                with contextlib.suppress(Exception):
                    self._settle(*self._finished.get_nowait())

    def _run(self, jobs: Iterator[JobType], pool: ThreadPoolExecutor) -> None:
        try:
            while True:
                wait_s = self._start_what_may(jobs, pool)
                if not self._running and (wait_s is None or self._stopping.is_set()):
                    return
                self._take_results(wait_s)
        except BaseException:
            self._interrupted = True
            self.stop()
            if self._running:
                print(f"waiting for {self._running} calls in flight: they are paid for", file=sys.stderr)
            while self._running:
                with contextlib.suppress(Exception):  # the first one is on its way up
                    self._take_results(None)
            raise

    def _start_what_may(self, jobs: Iterator[JobType], pool: ThreadPoolExecutor) -> float | None:
        """Start calls until a limit is reached; seconds until the next may start, None if none waits for time."""
        while not self._stopping.is_set() and self._running < int(self._width):
            now_s = self._clock()
            if not self._waiting or self._waiting[0].ready_s > now_s:
                # A failing server must not make us pull every job into memory.
                job = next(jobs, None) if len(self._waiting) < 4 * self._limits.in_flight else None
                if job is None:
                    return max(0.0, self._waiting[0].ready_s - now_s) if self._waiting else None
                heapq.heappush(self._waiting, _Waiting(now_s, next(self._numbers), job))
            waiting = self._admitted()
            if waiting is None:
                if not self._running:
                    self.stop()
                return None
            if waiting.ready_s > now_s:
                return waiting.ready_s - now_s
            tokens = self._tokens(waiting.job)
            if (wait_s := self._limiter.wait_s(now_s, tokens)) > 0:
                return wait_s
            self._limiter.start(now_s, tokens)
            self._running += 1
            self._waiting.remove(waiting)
            heapq.heapify(self._waiting)
            pool.submit(self._call, waiting)
        return None

    def _admitted(self) -> _Waiting[JobType] | None:
        """The next job that may start; when that is refused, the earliest that waits for its retry.

        A retry was admitted before and holds what was reserved for it: only its end makes room for others.
        """
        first = self._waiting[0]
        if self._admit(first.job):
            return first
        retries = [waiting for waiting in self._waiting if waiting.attempt > 1 and waiting is not first]
        return min((retry for retry in retries if self._admit(retry.job)), default=None)

    def _call(self, waiting: _Waiting[JobType]) -> None:
        try:
            result: Any = self._work(waiting.job)
        except BaseException as error:  # noqa: BLE001 - handed to the deciding thread, which raises it
            result = error
        self._finished.put((waiting, result))

    def _take_results(self, timeout_s: float | None) -> None:
        """Wait for one result, at most `timeout_s`, and take whatever else is there."""
        timeout_s = None if timeout_s is None else min(timeout_s, _LONGEST_NAP_S)
        if not self._running:
            self._stopping.wait(timeout_s)
            return
        with contextlib.suppress(queue.Empty):
            item = self._finished.get(timeout=timeout_s)
            while True:
                self._running -= 1
                self._settle(*item)
                item = self._finished.get_nowait()

    def _settle(self, waiting: _Waiting[JobType], result: Any) -> None:
        if not isinstance(result, CallFailed):
            if isinstance(result, BaseException):
                if self._interrupted:  # by this or an earlier one, which is on its way up
                    return
                raise result
            self._width = min(self._limits.in_flight, self._width + 1 / self._width)
            self._done(waiting.job, result)
            return
        if result.stop or result.fatal:
            self.stopped = self.stopped or result
            self.stop()
        attempts = self._limits.attempts * (_PATIENCE_WHEN_TOLD if result.delay_s is not None else 1)
        if result.retry and waiting.attempt < attempts and not self._stopping.is_set():
            self._retry(waiting, result)
        else:
            self._done(waiting.job, result)

    def _retry(self, waiting: _Waiting[JobType], failure: CallFailed) -> None:
        now_s = self._clock()
        delay_s = failure.delay_s
        if delay_s is None:
            backoff_s = min(self._limits.backoff_s * 2 ** (waiting.attempt - 1), _LONGEST_BACKOFF_S)
            delay_s = backoff_s * self._jitter.uniform(0.75, 1.25)
        elif delay_s >= _LONGEST_BACKOFF_S and now_s >= self._told_until_s:
            self._told_until_s = now_s + delay_s
            words = f"{failure.status}: {failure.message}"
            print(f"waiting {delay_s:,.0f} s, as the server says ({words})", file=sys.stderr)
        if failure.slow_down:
            if now_s >= self._limiter.paused_until_s:  # once for all calls that ran into the same limit
                self._width = max(1.0, self._width / 2)
            self._limiter.pause(now_s + delay_s)
        later = _Waiting(now_s + delay_s, waiting.number, waiting.job, waiting.attempt + 1)
        heapq.heappush(self._waiting, later)
