"""Replies of the judge that were paid for are kept, and not paid for again, whatever is wrong with them."""

import json

import pytest

from fasttrain_data.gemini_double import GeminiDouble
from fasttrain_data.records import ATTRIBUTES, Annotation, parse_record


def test_a_reply_with_half_a_character_is_kept_and_its_reason_is_valid_text(completions, annotate, tmp_path):
    scores = dict(zip(ATTRIBUTES, (4, 3, 2, 1, 0), strict=True))
    answers = [{"answer": number, "assessment": f"good \ud83d {number}", **scores} for number in (1, 2)]
    path = completions(2, answers=2)
    with GeminiDouble(text=lambda asked: json.dumps({"answers": answers})) as double:
        code, rows, _, _ = annotate(double, path)
        assert annotate(double, path)[1] == rows
        assert len(double.calls) == 2
    assert (code, {row["status"] for row in rows}) == (0, {"ok"})
    assert {row["completions"][0]["reason"][:6] for row in rows} == {"good \N{REPLACEMENT CHARACTER}"}
    journal = [json.loads(line) for line in (tmp_path / "annotations.journal.jsonl").read_text().splitlines()]
    assert {entry["reasons"][0] for entry in journal} == {"good \ud83d 1"}  # there as it came
    for row in rows:
        parse_record(Annotation, row, "annotations", "line 1")


def test_a_paid_reply_is_in_the_journal_whatever_its_judgement_does(
    completions, annotate, tmp_path, monkeypatch
):
    def broken(reply, answers):
        raise ZeroDivisionError

    path = completions(1)
    with GeminiDouble() as double:
        monkeypatch.setattr("fasttrain_data.annotations.ledger.judge_reply", broken)
        with pytest.raises(ZeroDivisionError):
            annotate(double, path)
        [line] = (tmp_path / "annotations.journal.jsonl").read_text().splitlines()
        assert "candidates" in json.loads(line)["raw"]
        monkeypatch.undo()
        _, [row], _, _ = annotate(double, path)
        assert (row["status"], len(double.calls)) == ("malformed", 1)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"usageMetadata": {"promptTokenCount": "100", "candidatesTokenCount": "many"}}, "ok"),
        ({"modelVersion": 7}, "ok"),
        ({"candidates": [{"content": "words"}]}, "malformed"),
        ({"candidates": [{"content": {"parts": [{"text": "[" * 3000}]}}]}, "malformed"),
    ],
)
def test_a_paid_reply_in_a_form_that_the_sdk_refuses_is_kept_and_not_paid_for_again(
    completions, annotate, read_rows, tmp_path, change, status
):
    with GeminiDouble() as double:
        calls, answer = [], double.answer

        def changed(*request):
            calls.append(answer(*request)[1] | change)
            return 200, calls[-1]

        double.answer = changed
        path = completions(prompts=1)
        for _ in range(2):
            code, [row], _, _ = annotate(double, path)
            assert (code, row["status"]) == (3 if status != "ok" else 0, status)
    [call] = calls
    [entry] = read_rows(tmp_path / "annotations.journal.jsonl")
    assert entry["raw"] == call


def test_a_reply_that_one_thread_can_read_and_the_next_not_write_ends_no_run(
    completions, annotate, read_rows, tmp_path
):
    """json follows as many levels as the stack has left: a thread of calls has more than the one that journals."""
    deep = []
    for _ in range(950):
        deep = [deep]
    with GeminiDouble() as double:
        answer = double.answer
        double.answer = lambda *request: (200, answer(*request)[1] | {"more": deep})
        path = completions(prompts=2)
        for _ in range(2):
            assert annotate(double, path)[0] == 0
    assert len(double.calls) == 2
    assert [row["status"] for row in read_rows(tmp_path / "annotations.journal.jsonl")] == ["ok", "ok"]
