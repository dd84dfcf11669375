"""Judge calls: what goes wrong is named, tried again as the server says, paid once, and never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError
from fasttrain.evaluate.judging import JudgeOptions, forecast_judging, judge_benchmark
from fasttrain_data.calls.dispatch import CallLimits
from fasttrain_data.gemini_double import GeminiDouble

QUESTIONS = 12


@pytest.fixture
def data(tmp_path: Path, write_rows: Callable[..., Path]) -> Path:
    """MT-Bench with single-turn questions only: one call each."""
    folder = tmp_path / "data"
    rows = [{"question_id": n, "category": "stem", "turns": [f"question {n}."]} for n in range(QUESTIONS)]
    write_rows(folder / "question.jsonl", rows)
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    write_rows(
        folder / "judge_prompts.jsonl",
        [{"name": n, "system_prompt": "judge", "prompt_template": "{question} {answer}"} for n in names],
    )
    answers = [{"question_id": n, "choices": [{"turns": [f"answer {n}"]}]} for n in range(QUESTIONS)]
    write_rows(tmp_path / "m.jsonl", answers)
    return folder


def number_of(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].split()[1].rstrip("."))


def run(data: Path, tmp_path: Path, judge: JudgeOptions) -> dict[str, Any]:
    return judge_benchmark("mt-bench", data, tmp_path / "m.jsonl", tmp_path / "out", judge)


def test_every_fault_has_its_status_and_none_counts(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    faults = {0: 429, 1: 500, 2: "hang up", 3: "blocked", 4: "empty", 5: "cut", 6: 400, 7: "not json"}
    judge_double.say = lambda body: "Long words before the end. Rating: [[8]]"
    judge_double.fault = lambda body, attempt: faults.get(number_of(body))
    scores = run(data, tmp_path, options(judge_double))
    assert scores["excluded"] == {
        "blocked_answer": 1, "empty": 1, "malformed": 1, "parse_failed": 1, "rate_limited": 1,
        "refused_request": 1, "server_error": 2,
    }  # fmt: skip
    assert scores["score"] == 8 and scores["n"] == 4
    official = rows_of(tmp_path / "out/model_judgment/judge-1_single.jsonl")
    assert [row["judgment"] for row in official[:2]] == ["$ERROR$", "$ERROR$"]
    assert [row["score"] for row in official] == [-1] * 8 + [8] * 4


def test_passing_faults_are_tried_again_and_leave_no_trace(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    judge_double.fault = lambda body, attempt: (
        (429, 500, "hang up", None)[number_of(body) % 4] if not attempt else None
    )
    scores = run(data, tmp_path, options(judge_double))
    assert scores["excluded"] == {} and scores["n"] == QUESTIONS
    assert len(judge_double.bodies) == QUESTIONS + 9


def test_a_rerun_asks_nothing_and_retries_only_what_may_pass(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    judge_double.fault = lambda body, attempt: {0: 500, 1: "blocked"}.get(number_of(body))
    first = run(data, tmp_path, options(judge_double))
    assert first["excluded"] == {"blocked_answer": 1, "server_error": 1}
    judge_double.fault = lambda body, attempt: None
    judge_double.bodies.clear()
    second = run(data, tmp_path, options(judge_double))
    assert [number_of(body) for body in judge_double.bodies] == [0]
    assert second["excluded"] == {"blocked_answer": 1} and second["judge"]["replies_this_run"] == 1
    judge_double.bodies.clear()
    third = run(data, tmp_path, options(judge_double, retry=frozenset({"blocked_answer"})))
    assert [number_of(body) for body in judge_double.bodies] == [1] and third["excluded"] == {}


def test_a_refused_key_ends_the_run_in_one_line_without_the_key(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: Callable[..., JudgeOptions],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    message = {"error": {"message": "Incorrect API key provided: sk-very-secret"}}
    judge_double.fault = lambda body, attempt: (401, message)
    with pytest.raises(
        UserError, match=r"the judge's server refuses: 401: Incorrect API key provided: \[key\]"
    ):
        run(data, tmp_path, options(judge_double))
    assert judge_double.headers[0]["Authorization"] == "Bearer sk-very-secret"
    # a wrong key says nothing about a question: with the right one, all are asked
    assert not (tmp_path / "out" / "judge.journal.jsonl").exists()


def test_a_refusal_of_the_judge_is_a_blocked_answer(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I cannot rate this."}
    reply = {"model": "judge-a", "choices": [{"message": message, "finish_reason": "stop"}]}
    judge_double.fault = lambda body, attempt: (200, reply) if number_of(body) == 3 else None
    assert run(data, tmp_path, options(judge_double))["excluded"] == {"blocked_answer": 1}


def test_a_reply_nested_very_deeply_ends_no_run(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    deep: list[Any] = []
    for _ in range(950):
        deep = [deep]
    message = {"role": "assistant", "content": "Rating: [[7]]"}
    reply = {"model": "judge-a", "choices": [{"message": message}], "more": deep}
    judge_double.fault = lambda body, attempt: (200, reply)
    for _ in range(2):
        scores = run(data, tmp_path, options(judge_double))
        assert (scores["score"], scores["n"]) == (7.0, QUESTIONS)
    assert len(judge_double.bodies) == QUESTIONS


def test_a_spent_account_stops_early_and_the_rest_is_marked_quota(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    spent = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    judge_double.fault = lambda body, attempt: (429, spent) if number_of(body) >= 5 else None
    limits = CallLimits(in_flight=1, attempts=3, backoff_s=0.0)
    scores = run(data, tmp_path, options(judge_double, limits=limits))
    assert scores["n"] == 5 and scores["excluded"] == {"quota": 7}
    assert len(judge_double.bodies) == 6
    assert "exceeded your current quota" in scores["judge"]["stopped"]


def test_a_server_that_wants_other_names_gets_them(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    def fault(body: dict[str, Any], attempt: int) -> Any:
        if "max_tokens" in body:
            return 400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}}
        if "temperature" in body:
            return 400, {"error": {"message": "'temperature' does not support 0 with this model."}}
        return None

    judge_double.fault = fault
    scores = run(data, tmp_path, options(judge_double))
    assert scores["n"] == QUESTIONS
    assert judge_double.bodies[-1]["max_completion_tokens"] == 2048
    assert scores["judge"]["notes"] == ["the judge's server refuses a temperature; its own was used"]


def test_the_cost_cap_stops_before_it_is_passed_and_counts_earlier_runs(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("prices: [{model: judge-1, from: 2020-01-01, input: 100.0, output: 1000.0}]\n")
    # a reply costs 100 x 100e-6 + 10 x 1000e-6 = 0.02; at most it could cost 2.05 with 2048 tokens of output
    judge = options(
        judge_double, prices=prices, max_cost_usd=0.13, max_output_tokens=20, limits=CallLimits(in_flight=1)
    )
    scores = run(data, tmp_path, judge)
    assert scores["judge"]["spent_usd"] == pytest.approx(0.12)
    assert scores["n"] == 6 and scores["excluded"] == {"quota": 6}
    assert "--max-cost 0.13 USD is reached" in scores["judge"]["stopped"]
    judge_double.bodies.clear()
    assert run(data, tmp_path, judge)["n"] == 6 and judge_double.bodies == []


def test_a_cost_cap_without_a_price_is_refused(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    with pytest.raises(UserError, match="--max-cost: wanted a price for judge-1"):
        run(data, tmp_path, options(judge_double, max_cost_usd=1.0))


def test_the_forecast_counts_calls_without_making_one(
    data: Path, tmp_path: Path, judge_double: Any, options: Callable[..., JudgeOptions]
) -> None:
    judge = options(judge_double)
    forecast = forecast_judging("mt-bench", data, tmp_path / "m.jsonl", tmp_path / "out", judge)
    assert (forecast.calls, forecast.calls_in_journal, forecast.usd) == (QUESTIONS, 0, None)
    assert judge_double.bodies == []
    run(data, tmp_path, judge)
    forecast = forecast_judging("mt-bench", data, tmp_path / "m.jsonl", tmp_path / "out", judge)
    assert (forecast.calls, forecast.calls_in_journal) == (0, QUESTIONS)


def test_a_limit_counts_questions_and_not_answers(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Of the first five, two have no answer: three are judged, none from beyond."""
    answers = [row for row in rows_of(tmp_path / "m.jsonl") if row["question_id"] not in (1, 3)]
    write_rows(tmp_path / "m.jsonl", answers)
    scores = run(data, tmp_path, options(judge_double, limit=5, partial=True))
    assert sorted(map(number_of, judge_double.bodies)) == [0, 2, 4]
    assert (scores["n"], scores["missing"], scores["unknown"]) == (3, 2, 0)
    with pytest.raises(
        UserError, match="wanted an answer to each of 5 questions, got none to 2 of them, first 1"
    ):
        run(data, tmp_path, options(judge_double, limit=5))
    write_rows(tmp_path / "m.jsonl", answers[-2:])
    with pytest.raises(UserError, match="got none of its first 5 ids"):
        run(data, tmp_path, options(judge_double, limit=5, partial=True))


def test_another_server_is_another_judge_and_the_apis_own_needs_no_address(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: Callable[..., JudgeOptions],
) -> None:
    run(data, tmp_path, options(judge_double))

    def left(**more: Any) -> int:
        judge = options(judge_double, **more)
        return forecast_judging("mt-bench", data, tmp_path / "m.jsonl", tmp_path / "out", judge).calls

    assert left() == left(base_url=f"{judge_double.url}/v1/") == 0
    assert left(base_url="http://other.example") == left(api="gemini") == QUESTIONS
    monkeypatch.setenv("OPENAI_BASE_URL", judge_double.url)
    assert left(base_url=None) == 0
    for name in ("OPENAI_BASE_URL", "GOOGLE_GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    own = [options(judge_double, base_url=url).server for url in (None, "https://api.openai.com")]
    assert own == ["", ""] and options(judge_double, api="gemini", base_url=None).server == ""


def test_a_journal_without_servers_goes_on_at_the_apis_own() -> None:
    """The key of a request as earlier versions wrote it into journals."""
    from fasttrain.evaluate.judging.request import JudgeRequest
    from fasttrain_data.ids import content_hash

    asked = {"model": "gemini-3.8-flash", "system": "s", "prompt": "p", "temperature": 0.0}
    request = JudgeRequest(**asked, max_output_tokens=9, about="1")
    assert request.key == content_hash("judge", "gemini-3.8-flash", "s", "p", 0.0, 9, 0)
    elsewhere = JudgeRequest(**asked, max_output_tokens=9, about="1", server="gemini http://a.example")
    assert elsewhere.key != request.key


def test_two_versions_of_a_judge_in_one_score_are_warned_of(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    capsys: pytest.CaptureFixture[str],
    options: Callable[..., JudgeOptions],
) -> None:
    versions = iter(["judge-a"] * 5 + ["judge-b"] * 7)
    judge_double.version = lambda: next(versions)
    scores = run(data, tmp_path, options(judge_double, limits=CallLimits(in_flight=1)))
    assert scores["judge"]["versions"] == {"judge-a": 5, "judge-b": 7}
    assert "several judge versions in one score: judge-a, judge-b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": " "}, "--judge: wanted a model name"),
        ({"api": "bard"}, "--judge-api: wanted gemini or openai, got 'bard'"),
        ({"base_url": "localhost:1"}, "--judge-url: wanted http://... or https://..., got 'localhost:1'"),
        ({"temperature": 3.0}, "--judge-temperature: wanted 0 to 2"),
        ({"retry": frozenset({"bad luck"})}, "--retry: wanted one of"),
    ],
)
def test_wrong_options_are_named(
    more: dict[str, Any],
    message: str,
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    options: Callable[..., JudgeOptions],
) -> None:
    with pytest.raises(UserError) as error:
        run(data, tmp_path, options(judge_double, **more))
    assert message in str(error.value)


def test_openai_itself_wants_a_key(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="wanted an API key in the environment variable OPENAI_API_KEY"):
        run(data, tmp_path, JudgeOptions(model="judge-1", api="openai", quiet=True))


def test_gemini_judges_and_its_faults_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Callable[..., JudgeOptions]
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "double-key")
    faults = {0: "blocked_prompt", 1: "blocked_answer", 2: "max_tokens_thinking", 3: "empty", 4: "recitation"}
    passing = {5: "rate_limit", 6: "rate_limit_header", 7: "unavailable", 8: "disconnect"}
    numbers: dict[str, int] = {}

    def text(prompt: str) -> str:
        return f"**Rating: [[{6 + int(prompt.split()[1].rstrip('.')) % 3}]]**"

    attempts: Counter[int] = Counter()
    with GeminiDouble(text=text, retry_delay_s=0.01) as double:

        def fault(key: str, attempt: int) -> str | None:
            number = numbers[key]
            attempts[number] += 1
            return faults.get(number) or (passing.get(number) if attempts[number] == 1 else None)

        from fasttrain_data.gemini_double.server import request_key

        for n in range(QUESTIONS):
            body = {"contents": [{"parts": [{"text": f"question {n}. answer {n}"}]}]}
            numbers[request_key(body)] = n
        double.faults = fault
        judge = options(double, api="gemini", model="gemini-3.8-flash")
        scores = run(data, tmp_path, judge)
        calls = len(double.calls)
        assert run(data, tmp_path, judge)["score"] == scores["score"] and len(double.calls) == calls
    assert scores["excluded"] == {
        "blocked_answer": 1, "blocked_prompt": 1, "empty": 1, "recitation": 1, "truncated": 1
    }  # fmt: skip
    assert scores["n"] == 7 and scores["score"] == pytest.approx(sum(6 + n % 3 for n in range(5, 12)) / 7)
    assert scores["judge"]["versions"] == {"gemini-double-001": 12}
    assert scores["judge"]["spent_usd"] > 0


def test_a_killed_judging_loses_at_most_the_calls_in_flight(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    questions, in_flight = 120, 4
    rows = [{"question_id": n, "category": "stem", "turns": [f"question {n}."]} for n in range(questions)]
    write_rows(data / "question.jsonl", rows)
    answers = [{"question_id": n, "choices": [{"turns": [f"answer {n}"]}]} for n in range(questions)]
    write_rows(tmp_path / "m.jsonl", answers)
    judge_double.say = lambda body: f"Rating: [[{number_of(body) % 10 + 1}]]"
    program = textwrap.dedent(f"""
        from pathlib import Path
        from fasttrain.evaluate.judging import JudgeOptions, judge_benchmark
        from fasttrain_data.calls.dispatch import CallLimits
        judge = JudgeOptions(model="judge-1", api="openai", base_url={judge_double.url!r}, quiet=True,
                             limits=CallLimits(in_flight={in_flight}))
        judge_benchmark("mt-bench", Path({str(data)!r}), Path({str(tmp_path / "m.jsonl")!r}), Path({str(tmp_path / "out")!r}), judge)
    """)
    kills = 0
    for after in (10, 55):
        process = subprocess.Popen([sys.executable, "-c", program], env=dict(os.environ))
        deadline = time.monotonic() + 60
        while (
            len(judge_double.bodies) < after + kills
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    scores = run(data, tmp_path, options(judge_double))
    assert scores["n"] == questions and scores["score"] == 5.5
    assert questions <= judge_double.billed.total() <= questions + kills * in_flight
    keys = [row["key"] for row in rows_of(tmp_path / "out" / "judge.journal.jsonl")]
    assert len(keys) == len(set(keys)) == questions
