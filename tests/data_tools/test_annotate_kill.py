"""SIGKILL at random moments: nothing that was journaled is paid again, nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from fasttrain_data.gemini_double import FaultMix, GeminiDouble

FAULTS = (
    "rate_limit",
    "server_error",
    "unavailable",
    "timeout",
    "cut_json",
    "missing_answer",
    "out_of_range",
    "blocked_prompt",
    "max_tokens",
)
# 5 % of each; the rest is answered well
MIX = FaultMix(dict.fromkeys(FAULTS, 0.05))
IN_FLIGHT = 16


def start(double, path, output, *more):
    arguments = ["annotate", path, "-o", output, "--model", "gemini-3.8-flash", "--in-flight", IN_FLIGHT]
    arguments += ["--timeout", "1", "--backoff", "0.05", *more]
    environment = {**os.environ, "GOOGLE_GEMINI_BASE_URL": double.url, "GEMINI_API_KEY": double.api_key}
    command = [sys.executable, "-m", "fasttrain_data", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def paid_entries(journal):
    """Journal keys with a reply; a torn last line is not one yet."""
    keys = Counter()
    if journal.exists():
        for line in journal.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            if "usage" in row:
                keys[row["key"]] += 1
    return keys


def kill_and_rerun(tmp_path, write_rows, prompts, kills, window_s, *more, delay_s=0.02):
    rows = [
        {"id": f"{n}-{k}", "question_id": str(n), "question": f"What is {n}?", "text": f"answer {k} to {n}"}
        for n in range(prompts)
        for k in range(4)
    ]
    path, output = write_rows(tmp_path / "c.jsonl", rows), tmp_path / "a.jsonl"
    journal = tmp_path / "a.journal.jsonl"
    rng, done_before = random.Random(5), Counter()
    with GeminiDouble(faults=MIX, delay_s=delay_s, timeout_s=3) as double:
        for _ in range(kills):
            process = start(double, path, output, *more)
            grown = time.monotonic() + 30
            size = journal.stat().st_size if journal.exists() else 0
            while time.monotonic() < grown and not (journal.exists() and journal.stat().st_size > size):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, window_s))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            now = paid_entries(journal)
            assert not done_before - now, "a kill lost replies that were journaled"
            done_before = now
        process = start(double, path, output, *more)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 3, out
        paid = paid_entries(journal)
        billed = double.billed()
        calls = len(double.calls)
        again = start(double, path, output, *more)
        out, _ = again.communicate(timeout=120)
        assert "this run: 0 replies, 0 calls without reply" in out
        assert len(double.calls) == calls
    assert set(paid.values()) == {1}, "a journaled reply was paid for again"
    assert len(paid) == prompts
    lost = billed.total() - paid.total()
    assert 0 <= lost <= kills * IN_FLIGHT, "more calls were lost than could be in flight"
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["question_id"] for row in made] == [str(n) for n in range(prompts)]
    assert all(row["status"] == "ok" or row["detail"] for row in made)
    return Counter(row["status"] for row in made), lost


def test_three_kills_lose_at_most_the_calls_in_flight(tmp_path, write_rows):
    statuses, _ = kill_and_rerun(tmp_path, write_rows, 250, 3, 0.25)
    assert statuses["ok"] > 150


@pytest.mark.slow
def test_twenty_kills_of_a_thousand_prompts_lose_at_most_the_calls_in_flight(tmp_path, write_rows):
    statuses, lost = kill_and_rerun(tmp_path, write_rows, 1000, 20, 0.25)
    print(dict(statuses), "calls billed but lost in flight:", lost)
    assert statuses.total() == 1000


def test_sigterm_waits_for_paid_calls_and_exits_143(tmp_path, write_rows):
    rows = [{"id": str(n), "question_id": str(n), "question": f"{n}?", "text": "x"} for n in range(200)]
    path, output = write_rows(tmp_path / "c.jsonl", rows), tmp_path / "a.jsonl"
    with GeminiDouble(delay_s=0.3) as double:
        process = start(double, path, output)
        while not double.calls:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 143
        assert "start the same command again" in out
        assert paid_entries(tmp_path / "a.journal.jsonl").total() == len(double.calls)
