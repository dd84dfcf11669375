"""The batch API: half price, resumed at every step, nothing sent twice."""

from collections import Counter

import pytest

from fasttrain_data.annotations import batch
from fasttrain_data.annotations.batch_api import BatchApi, read_result
from fasttrain_data.annotations.judge import Endpoint
from fasttrain_data.annotations.reply import Reply, judge_reply
from fasttrain_data.annotations.run import annotate
from fasttrain_data.annotations.sdk_genai import GenaiJudge
from fasttrain_data.annotations.settings import AnnotateSettings
from fasttrain_data.calls.dispatch import CallLimits
from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.errors import UserError
from fasttrain_data.gemini_double import FaultMix, GeminiDouble


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


@pytest.fixture
def path(tmp_path, write_rows, draw):
    draw(tmp_path / "a.png")
    rows = [
        {
            "id": f"{n}{k}",
            "question_id": f"q{n}",
            "image": "a.png",
            "question": f"What is {n}?",
            "text": f"{k}",
        }
        for n in range(20)
        for k in range(3)
    ]
    return write_rows(tmp_path / "c.jsonl", rows)


def run(double, path, **changes):
    limits = CallLimits(backoff_s=0.01, attempts=3)
    settings = AnnotateSettings(
        **{"model": "gemini-3.8-flash", "batch": True, "poll_s": 0.0, "limits": limits, **changes}
    )
    judge = GenaiJudge(Endpoint(api_key=double.api_key, base_url=double.url, timeout_s=20))
    return annotate(path, path.with_name("a.jsonl"), settings, judge, quiet=True)


def test_a_batch_gives_the_same_scores_at_half_the_price(path, read_rows):
    with GeminiDouble(batch_polls=3) as double:
        result = run(double, path)
        batched = read_rows(path.with_name("a.jsonl"))
        assert (result.statuses, double.batches.created) == (Counter(ok=20), 1)
        assert set(double.billed().values()) == {1}
        for leftover in path.parent.glob("*"):
            assert leftover.name in {"a.png", "c.jsonl", "a.jsonl", "a.journal.jsonl"}
        path.with_name("a.journal.jsonl").unlink()
        run(double, path, batch=False)
        single = read_rows(path.with_name("a.jsonl"))
    for one, other in zip(batched, single, strict=True):
        assert one["completions"] == other["completions"]
        assert one["cost_usd"] == pytest.approx(other["cost_usd"] / 2, abs=1e-8)


def test_rows_of_a_batch_fail_one_by_one_and_only_the_transient_ones_go_again(path, read_rows):
    shares = {"server_error": 0.2, "blocked_answer": 0.2, "cut_json": 0.1, "rate_limit": 0.1}
    with GeminiDouble(faults=FaultMix(shares, seed=2)) as double:
        first = run(double, path).statuses
        assert {"ok", "server_error", "blocked_answer"} <= set(first)
        assert double.batches.created == 1
        second = run(double, path).statuses
        assert second == Counter(ok=20 - first["blocked_answer"] - first["malformed"]) + Counter(
            blocked_answer=first["blocked_answer"], malformed=first["malformed"]
        )
        assert double.batches.created == 2
        assert set(double.billed().values()) == {1}
        run(double, path)
        assert double.batches.created == 2


@pytest.mark.parametrize(
    "moment", ["before_upload", "after_upload", "after_create", "while_waiting", "while_collecting"]
)
def test_a_kill_at_any_step_sends_nothing_twice(path, monkeypatch, moment, read_rows):
    def die(*args, **kwargs):
        raise Killed

    with GeminiDouble(batch_polls=2) as double, monkeypatch.context() as patch:
        submit = BatchApi.submit
        if moment == "before_upload":
            patch.setattr(BatchApi, "submit", die)
        elif moment == "after_upload":

            def upload_then_die(self, model, requests, name):
                self._client.files.upload(file=str(requests), config={"mime_type": "application/jsonl"})
                raise Killed

            patch.setattr(BatchApi, "submit", upload_then_die)
        elif moment == "after_create":

            def create_then_die(self, model, requests, name):
                submit(self, model, requests, name)
                raise Killed

            patch.setattr(BatchApi, "submit", create_then_die)
        elif moment == "while_waiting":
            patch.setattr(BatchApi, "get", die)
        else:
            written = []
            write_reply = batch.Ledger.write_reply

            def write_some_then_die(self, call, reply, latency_s=None):
                if len(written) == 7:
                    raise Killed
                written.append(call)
                return write_reply(self, call, reply, latency_s)

            patch.setattr(batch.Ledger, "write_reply", write_some_then_die)
        with pytest.raises(Killed):
            run(double, path)
        assert not path.with_name("a.jsonl").exists()
        patch.undo()
        if moment in ("after_create", "while_waiting", "while_collecting"):
            with pytest.raises(UserError, match="go on with --batch"):
                run(double, path, batch=False)
        assert run(double, path).statuses == Counter(ok=20)
        assert double.batches.created == 1
        assert set(double.billed().values()) == {1}
    assert len(read_rows(path.with_name("a.jsonl"))) == 20


def test_a_failed_batch_is_reported_and_sent_again_by_the_next_run_only(path, monkeypatch):
    with GeminiDouble() as double, monkeypatch.context() as patch:
        patch.setattr(double.batches, "_work", lambda job: job.update(state="BATCH_STATE_FAILED"))
        assert run(double, path).statuses == Counter(server_error=20)
        assert double.batches.created == 1
        patch.undo()
        assert run(double, path).statuses == Counter(ok=20)
        assert double.batches.created == 2


def test_a_reply_that_comes_back_as_bad_as_before_is_paid_once_a_run(path, monkeypatch):
    submit = BatchApi.submit

    def submit_or_give_up(self, model, requests, name):
        assert double.batches.created < 3, "the same calls go out for ever"
        return submit(self, model, requests, name)

    with GeminiDouble(faults=FaultMix({"cut_json": 1.0})) as double:
        assert run(double, path).statuses == Counter(malformed=20)
        monkeypatch.setattr(BatchApi, "submit", submit_or_give_up)
        assert run(double, path, retry=("malformed",)).statuses == Counter(malformed=20)
        assert double.batches.created == 2
        assert set(double.billed().values()) == {2}


@pytest.mark.parametrize("lost", ["batch", "results"])
def test_a_batch_the_server_has_forgotten_is_reported_and_sent_again_by_the_next_run(
    path, monkeypatch, lost, read_rows
):
    with GeminiDouble() as double:
        store, get = double.batches, double.batches.get

        def forget(route, query):
            if lost == "batch":
                store.jobs.clear()
            elif ":download" in route:
                store.files.clear()
            return get(route, query)

        with monkeypatch.context() as patch:
            patch.setattr(store, "get", forget)
            assert run(double, path).statuses == Counter(server_error=20)
        assert "any more" in read_rows(path.with_name("a.jsonl"))[0]["detail"]
        assert run(double, path).statuses == Counter(ok=20)
        assert store.created == 2


def test_a_server_without_a_batch_api_does_not_make_batches_forgotten(path, monkeypatch):
    with GeminiDouble() as double:
        with monkeypatch.context() as patch:
            patch.setattr(BatchApi, "get", lambda *asked: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                run(double, path)
        with monkeypatch.context() as patch:
            patch.setattr(double.batches, "get", lambda *asked: None)
            with pytest.raises(UserError, match="404"):
                run(double, path)
        assert run(double, path).statuses == Counter(ok=20)
        assert double.batches.created == 1


def test_calls_of_a_batch_whose_state_was_deleted_count_as_not_made(path, monkeypatch, tmp_path):
    table = tmp_path / "prices.yaml"
    table.write_text("prices:\n- {model: gemini, from: 2020-01-01, input: 0, output: 1000}\n")
    with GeminiDouble() as double:
        with monkeypatch.context() as patch:
            patch.setattr(BatchApi, "get", lambda *asked: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                run(double, path)
        path.with_name("a.batches.json").unlink()
        result = run(double, path, batch=False, prices=table, max_cost_usd=0.001)
        assert result.statuses == Counter(quota=20)


def test_large_work_is_split_into_batches(path, monkeypatch):
    monkeypatch.setattr(batch, "MAX_BATCH_CALLS", 7)
    with GeminiDouble() as double:
        assert run(double, path).statuses == Counter(ok=20)
        assert double.batches.created == 3


def test_the_cap_counts_what_waits_in_batches(path, tmp_path):
    table = tmp_path / "prices.yaml"
    table.write_text("prices:\n- {model: gemini, from: 2020-01-01, input: 0, output: 1000}\n")
    with GeminiDouble() as double:
        # 0.2 USD at most for a call: five fit under the cap at first, and their true price leaves room for more
        changes = {"prices": table, "max_output_tokens": 400, "max_cost_usd": 1.1}
        result = run(double, path, **changes)
        assert 0.9 < result.spent_usd <= 1.1
        assert set(result.statuses) == {"ok", "quota"}
        assert double.batches.created >= 2
        assert result.stopped == "--max-cost 1.1 USD is reached"


def test_a_flaky_batch_api_is_asked_again(path, monkeypatch):
    failures = {"get": 2, "post": 1}
    with GeminiDouble() as double:
        store = double.batches
        get, post = store.get, store.post
        error = {"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}

        def flaky_get(*args):
            failures["get"] -= 1
            return (503, error) if failures["get"] >= 0 else get(*args)

        def flaky_post(url, raw, headers):
            reply = post(url, raw, headers)
            if "batchGenerateContent" in url and failures["post"]:
                failures["post"] -= 1
                return 503, error, {}  # the batch was made, but the reply was lost
            return reply

        monkeypatch.setattr(store, "get", flaky_get)
        monkeypatch.setattr(store, "post", flaky_post)
        assert run(double, path).statuses == Counter(ok=20)
        assert store.created == 1


def test_errors_of_rows_speak_rpc_codes():
    def status(code):
        result = read_result({"key": "a", "error": {"code": code, "message": "m"}})
        assert isinstance(result, CallFailed)
        assert not (result.fatal or result.stop)
        return result.status

    assert [status(code) for code in (3, 4, 8, 13, 14, 7)] == [
        "refused_request",
        "timeout",
        "rate_limited",
        "server_error",
        "server_error",
        "refused_request",
    ]
    in_words = read_result({"key": "a", "error": "overloaded"})
    assert isinstance(in_words, CallFailed) and "overloaded" in in_words.message
    assert isinstance(read_result({"key": "a"}), CallFailed)


USAGE = {"promptTokenCount": 900, "candidatesTokenCount": 40, "thoughtsTokenCount": 2}


def test_a_reply_with_fields_the_sdk_does_not_know_is_read():
    usage = {**USAGE, "serviceTier": "flex"}
    parts = [{"text": "pondering", "thought": True}, {"text": "[1"}, {"text": "]"}]
    candidate = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP", "mood": "calm"}
    row = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "m-1", "weather": {"sun": 1}}
    reply = read_result({"key": "a", "response": row})
    assert isinstance(reply, Reply)
    assert (reply.text, reply.finish_reason, reply.model_version) == ("[1]", "STOP", "m-1")
    assert reply.usage == {"prompt": 900, "output": 40, "thoughts": 2, "cached": 0}
    assert reply.raw == row


@pytest.mark.parametrize(
    "candidates", ["x", [3], {"0": {}}, [{"content": "x"}], [{"content": {"parts": [{"text": 4}]}}]]
)
def test_an_answer_that_cannot_be_read_is_kept_with_its_cost(candidates):
    row = {"candidates": candidates, "usageMetadata": USAGE}
    reply = read_result({"key": "a", "response": row})
    assert isinstance(reply, Reply)
    assert judge_reply(reply, 3).status == "malformed"
    assert (reply.usage["prompt"], reply.raw) == (900, row)


def test_the_legacy_sdk_has_no_batch_api():
    with pytest.raises(UserError, match="--batch"):
        AnnotateSettings(model="m", sdk="google-generativeai", batch=True)


def test_results_of_calls_that_are_planned_no_more_are_kept_and_count_under_the_cap(path, monkeypatch):
    def die(self, name):
        raise Killed

    with GeminiDouble(batch_polls=2) as double:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(BatchApi, "get", die)
            run(double, path, votes=3)
        with pytest.raises(
            UserError, match=r"--model: wanted gemini-3.8-flash, of which a batch is under way"
        ):
            run(double, path, model="gemini-2.5-flash")
        fewer = run(double, path, votes=1)
        again = run(double, path, votes=3)
        assert fewer.statuses == again.statuses == Counter(ok=20)
        assert fewer.spent_usd == again.spent_usd > 0
        assert set(double.billed().values()) == {1}


@pytest.mark.parametrize(
    "junk", [b'{"key": null, "response": {}}', b'{"key": "of another"}', b"[]", b'{"key', b"\xff"]
)
def test_a_damaged_line_keeps_no_other_result_of_its_batch_out(path, monkeypatch, junk):
    download = BatchApi.download

    def damaged(self, file, target):
        there = download(self, file, target)
        lines = target.read_bytes().splitlines()
        target.write_bytes(b"\n".join([junk, b"", *lines[1:]]))
        return there

    with GeminiDouble() as double, monkeypatch.context() as patch:
        patch.setattr(BatchApi, "download", damaged)
        assert run(double, path).statuses == Counter(ok=19, server_error=1)
