"""Limits, retries and the journal: the machinery under every stage that pays for calls."""

import email.utils
import errno
import fcntl
import json
import os
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain_data.calls.dispatch import CallLimits, Dispatcher
from fasttrain_data.calls.failures import CallFailed, failure_of, without_key
from fasttrain_data.calls.journal import Journal
from fasttrain_data.calls.limits import Limiter
from fasttrain_data.errors import BadRow, UserError


def run_limiter(limiter, seconds, *, late=lambda: 0.0, tokens=0):
    """Start times of calls that start as soon as they may, on a clock of our own."""
    now, starts = 0.0, []
    while now < seconds:
        wait = limiter.wait_s(now, tokens)
        if wait > 0:
            now += wait + late()
            continue
        limiter.start(now, tokens)
        starts.append(now)
    return starts


def most_in_a_minute(starts):
    return max(sum(1 for other in starts if start <= other < start + 60) for start in starts)


def test_no_minute_sees_more_than_rpm_and_nearly_all_of_it_is_used():
    rng = random.Random(1)
    for late in (lambda: 0.0, lambda: rng.expovariate(1 / 0.03)):
        starts = run_limiter(Limiter(rpm=600), 180, late=late)
        assert most_in_a_minute(starts) <= 600
        assert len(starts) >= 0.98 * 600 * 3


def test_a_hold_up_is_caught_up_without_breaking_the_minute():
    limiter = Limiter(rpm=600)
    first = run_limiter(limiter, 30)
    limiter.pause(50)
    assert limiter.wait_s(30) == pytest.approx(20)
    now, starts = 50.0, list(first)
    while now < 200:
        if (wait := limiter.wait_s(now)) > 0:
            now += wait
        else:
            limiter.start(now)
            starts.append(now)
    assert most_in_a_minute(starts) <= 600


def test_tokens_per_minute_are_kept_and_an_oversized_call_still_goes():
    starts = run_limiter(Limiter(tpm=1000), 240, tokens=300)
    assert most_in_a_minute(starts) == 3
    oversized = run_limiter(Limiter(tpm=1000), 200, tokens=2500)
    assert oversized == pytest.approx([0, 60.5, 121, 181.5])


def dispatch(work, jobs, **limits):
    done = []
    limits = {"backoff_s": 0.001, "in_flight": 4, **limits}
    dispatcher = Dispatcher(work, lambda job, result: done.append((job, result)), CallLimits(**limits))
    dispatcher.run(iter(jobs))
    return done, dispatcher


def test_every_job_is_done_once_and_no_more_run_than_allowed():
    lock, running, most = threading.Lock(), 0, 0
    gate = threading.Barrier(5)

    def work(job):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if job < 5:
            gate.wait(5)  # passes only when five run at once
        with lock:
            running -= 1
        return job * 2

    done, _ = dispatch(work, range(57), in_flight=5)
    assert sorted(done) == [(job, job * 2) for job in range(57)]
    assert most == 5


def test_a_call_is_retried_until_its_attempts_are_used_up():
    attempts = {}

    def work(job):
        attempts[job] = attempts.get(job, 0) + 1
        if attempts[job] <= job:
            raise CallFailed("server_error", "500", retry=True)
        return "fine"

    done, _ = dispatch(work, range(5), attempts=3)
    assert {job: result for job, result in done if result == "fine"} == {0: "fine", 1: "fine", 2: "fine"}
    assert {job: result.status for job, result in done if result != "fine"} == {
        3: "server_error",
        4: "server_error",
    }
    assert attempts == {0: 1, 1: 2, 2: 3, 3: 3, 4: 3}


def test_a_failure_that_no_retry_helps_is_not_retried():
    calls = []

    def work(job):
        calls.append(job)
        raise CallFailed("refused_request", "400")

    done, dispatcher = dispatch(work, range(3))
    assert (sorted(calls), len(done), dispatcher.stopped) == ([0, 1, 2], 3, None)


def test_the_servers_delay_is_kept_by_all_calls():
    now, slept, started = [0.0], [], []

    class Clock(Dispatcher):
        def _take_results(self, timeout_s):
            if not self._running and timeout_s:
                now[0] += timeout_s
                slept.append(timeout_s)
                return
            super()._take_results(timeout_s)

    def work(job):
        started.append((job, now[0]))
        if len(started) == 1:
            raise CallFailed("rate_limited", "429", retry=True, delay_s=31.5, slow_down=True)
        return job

    done = []
    limits = CallLimits(in_flight=1, attempts=1)  # a told delay has attempts of its own
    dispatcher = Clock(work, lambda job, result: done.append(result), limits, clock=lambda: now[0])
    dispatcher.run(iter(range(3)))
    assert sorted(done) == [0, 1, 2]
    assert started[0] == (0, 0.0)
    assert all(start >= 31.5 for _, start in started[1:])
    assert sum(slept) == pytest.approx(31.5)


def test_a_long_wait_that_the_server_asks_for_is_told_once(capsys):
    now = [0.0]

    class Clock(Dispatcher):
        def _take_results(self, timeout_s):
            if not self._running and timeout_s:
                now[0] += timeout_s
                return
            super()._take_results(timeout_s)

    failed = set()

    def work(job):
        if job not in failed:
            failed.add(job)
            raise CallFailed("server_error", "503: asleep", retry=True, delay_s=7200.0)
        return job

    done = []
    Clock(work, lambda job, result: done.append(result), CallLimits(), clock=lambda: now[0]).run(
        iter(range(3))
    )
    assert sorted(done) == [0, 1, 2]
    assert capsys.readouterr().err == "waiting 7,200 s, as the server says (server_error: 503: asleep)\n"


def test_a_daily_quota_stops_new_calls_and_keeps_what_is_in_flight():
    def work(job):
        if job == 7:
            raise CallFailed("quota", "429 per day", stop=True)
        return job

    pulled = []

    def jobs():
        for job in range(1000):
            pulled.append(job)
            yield job

    done, dispatcher = dispatch(work, jobs())
    assert dispatcher.stopped is not None
    assert len(pulled) < 40
    assert {job for job, _ in done} == set(pulled)


def test_a_call_that_waits_for_its_retry_is_no_end_of_the_money():
    reserved, failures, results = set(), [1], []

    def work(job):
        if job == 0 and failures:
            failures.pop()
            raise CallFailed("server_error", "503", retry=True)
        return job

    def admit(job):
        if job not in reserved and reserved:
            return False
        reserved.add(job)
        return True

    def done(job, result):
        reserved.discard(job)
        results.append(result)

    limits = CallLimits(in_flight=2, backoff_s=0.01)
    Dispatcher(work, done, limits, admit=admit).run(iter(range(3)))
    assert results == [0, 1, 2]


def test_an_interruption_waits_for_the_calls_that_are_paid():
    release = threading.Event()
    results = []

    def work(job):
        if job:
            release.wait(5)
        return job

    def done(job, result):
        results.append(result)
        if job == 0:
            release.set()
            raise KeyboardInterrupt

    dispatcher = Dispatcher(work, done, CallLimits(in_flight=4))
    with pytest.raises(KeyboardInterrupt):
        dispatcher.run(iter(range(100)))
    assert sorted(results) == [0, 1, 2, 3]


def test_a_second_interruption_loses_no_paid_call_either(capsys):
    released = [threading.Event(), threading.Event()]
    results = []

    def work(job):
        if job:
            released[job > 1].wait(5)
        return job

    def done(job, result):
        results.append(result)
        if job < 2:
            released[job].set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Dispatcher(work, done, CallLimits(in_flight=4)).run(iter(range(100)))
    assert sorted(results) == [0, 1, 2, 3]
    assert capsys.readouterr().err == "waiting for 3 calls in flight: they are paid for\n"


def test_a_failing_server_does_not_pull_every_job_into_memory():
    pulled = []

    def jobs():
        for job in range(500):
            pulled.append(job)
            yield job

    def work(job):
        raise CallFailed("server_error", "503", retry=True)

    class UntilIdle(Dispatcher):
        def _take_results(self, timeout_s):
            if not self._running:  # everything pulled waits for its next attempt
                self.stop()
                return
            super()._take_results(timeout_s)

    dispatcher = UntilIdle(work, lambda job, result: None, CallLimits(in_flight=4), clock=lambda: 0.0)
    dispatcher.run(jobs())
    assert 4 * 4 <= len(pulled) <= 4 * 4 + 4


@pytest.mark.parametrize(
    ("code", "message", "details", "headers", "status", "retry", "delay_s"),
    [
        (429, "quota", [{"retryDelay": "34.07s"}], {}, "rate_limited", True, 34.07),
        (
            429,
            "quota",
            [{"retry_delay": {"seconds": 3, "nanos": 500_000_000}}],
            {},
            "rate_limited",
            True,
            3.5,
        ),
        (429, "quota", [], {"retry-after": "12"}, "rate_limited", True, 12.0),
        (429, "quota", [], {}, "rate_limited", True, None),
        (
            429,
            "q",
            [{"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}],
            {},
            "quota",
            False,
            None,
        ),
        (429, "q", [{"metadata": {"quota_limit": "RequestsPerDay"}}], {}, "quota", False, None),
        (500, "internal", [], {}, "server_error", True, None),
        (503, "overloaded", [{"retryDelay": "7s"}], {}, "server_error", True, 7.0),
        (504, "deadline", [], {}, "timeout", True, None),
        (408, "timeout", [], {}, "timeout", True, None),
        (400, "Request contains an invalid argument.", [], {}, "refused_request", False, None),
        (400, "Unable to process input image", [], {}, "bad_image", False, None),
    ],
)
def test_http_errors_have_typed_meanings(code, message, details, headers, status, retry, delay_s):
    failure = failure_of(code, message, details, headers)
    assert (failure.status, failure.retry, failure.delay_s) == (status, retry, delay_s)
    assert failure.stop == (status == "quota")
    assert not failure.fatal


@pytest.mark.parametrize(
    ("code", "message", "details"),
    [
        (401, "x", []),
        (403, "x", []),
        (404, "x", []),
        (400, "API key not valid", []),
        (400, "x", [{"reason": "API_KEY_INVALID"}]),
    ],
)
def test_mistakes_in_key_or_model_are_fatal(code, message, details):
    assert failure_of(code, message, details).fatal


@pytest.mark.parametrize(
    ("told", "delay_s"),
    [
        ("Fri, 31 Dec 1999 23:59:59 GMT", None),
        ("0", None),
        ("-3", None),
        ("soon", None),
        ("0.5", 0.5),
        ("1e30", 86_400),
        ("inf", 86_400),
        ("nan", None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400),
    ],
)
def test_a_told_delay_is_a_time_that_can_be_waited(told, delay_s):
    """0 and a date gone by leave the wait, and the number of attempts, to us: no server is called on and on at once."""
    assert failure_of(503, "x", [], {"Retry-After": told}).delay_s == delay_s


def test_a_retry_after_date_counts_from_now():
    soon = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert failure_of(503, "x", [], {"Retry-After": soon}).delay_s == pytest.approx(100, abs=3)


def test_the_key_is_blotted_out():
    assert without_key("url?key=SECRET&x=SECRET", "SECRET") == "url?key=[key]&x=[key]"


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 400))
def test_a_journal_cut_at_any_byte_keeps_every_whole_line(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    with Journal(path) as journal:
        for number in range(5):
            journal.append(f"{number:024x}", {"text": "ü" * number, "n": number})
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    survivors = whole[: min(cut, len(whole))].count(b"\n")
    with Journal(path) as journal:
        assert len(journal) == survivors
        for number in range(5):
            entry = journal.get(f"{number:024x}")
            assert (entry is not None) == (number < survivors)
        journal.append(f"{9:024x}", {"n": 9})
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["n"] for row in rows] == [*range(survivors), 9]


def test_the_last_entry_of_a_key_counts_and_visitors_see_all(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append("aa", {"n": 1})
        journal.append("bb", {"n": 2, "text": "x" * 200_000})
        journal.append("aa", {"n": 3})
        assert journal.get("aa") == {"key": "aa", "n": 3}
    seen = []
    with Journal(path, seen.append) as journal:
        assert journal.get("aa") == {"key": "aa", "n": 3}
        assert len((journal.get("bb") or {})["text"]) == 200_000
        assert journal.get("cc") is None
    assert [row["n"] for row in seen] == [1, 2, 3]


def test_two_writers_of_one_journal_are_refused(tmp_path):
    with Journal(tmp_path / "j.jsonl"), pytest.raises(UserError, match="another process"):
        Journal(tmp_path / "j.jsonl")


def test_a_journal_that_was_taken_away_while_it_was_opened_is_not_written(tmp_path, monkeypatch):
    """Its file has no name any more: replies in it would be paid for and lost."""
    path = tmp_path / "j.jsonl"
    first, lock = Journal(path), fcntl.flock

    def lock_after_the_first_is_gone(*arguments):
        first.close(keep_empty=False)
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", lock_after_the_first_is_gone)
    with pytest.raises(UserError, match="another process"):
        Journal(path)
    assert not path.exists()


def test_a_file_system_without_locks_has_journals_too(tmp_path, monkeypatch):
    """Lustre without -o flock: every start was told that another process is writing."""

    def no_locks(*lock):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with Journal(tmp_path / "a.journal.jsonl") as journal:
        journal.append("ab", {"n": 1})
        assert journal.get("ab")["n"] == 1


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.append("aa", {"n": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:9]))
    with pytest.raises(OSError, match=r"No space left on device: .*j\.jsonl"):
        journal.append("bb", {"n": 2})
    monkeypatch.undo()
    journal.append("cc", {"n": 3})
    journal.close()
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["aa", "cc"]


def test_a_pace_slower_than_any_timer_can_wait_can_be_stopped():
    """The second call is due in more seconds than a timer takes."""
    dispatcher = Dispatcher(lambda job: job, lambda job, result: None, CallLimits(rpm=1e-300))
    threading.Timer(0.2, dispatcher.stop).start()
    dispatcher.run(iter(range(2)))


def test_a_failure_before_the_first_entry_leaves_no_journal_that_was_not_there(tmp_path):
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    Journal(old).close()
    for path in (new, old):
        with pytest.raises(UserError, match="nothing"), Journal(path):
            raise UserError("nothing to do")
    assert old.exists() and not new.exists()


def test_a_journal_key_that_is_no_hash_is_named(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"key": "from another tool"}\n')
    with pytest.raises(BadRow, match="line 1: key: wanted a content hash"):
        Journal(tmp_path / "j.jsonl")
