"""MT-Bench through a judge: which prompts are asked, what counts, and the files FastChat's tools read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError
from fasttrain.evaluate.judging import JudgeOptions, judge_benchmark
from fasttrain.evaluate.judging.told import score_lines

CATEGORIES = ("writing", "math", "stem")


def templates() -> list[dict[str, str]]:
    """Judge prompts in FastChat's form, in our words."""
    rows = []
    for kind in ("single", "pair"):
        for base in (f"{kind}-v1", f"{kind}-v2", f"{kind}-math-v1"):
            for end in ("", "-multi-turn"):
                reference = (
                    "ref {ref_answer_1} " + ("{ref_answer_2} " if end else "") if "math" in base else ""
                )
                if kind == "single":
                    body = (
                        "q {question_1} a {answer_1} q {question_2} a {answer_2}"
                        if end
                        else "q {question} a {answer}"
                    )
                else:
                    body = (
                        "{question_1} {question_2} A {answer_a_1} {answer_a_2} B {answer_b_1} {answer_b_2}"
                        if end
                        else "{question} A {answer_a} B {answer_b}"
                    )
                name = base + end
                rows.append(
                    {
                        "name": name,
                        "type": kind,
                        "system_prompt": f"judge by {name}",
                        "prompt_template": reference + body,
                    }
                )
    return rows


def answer_rows(
    model: str, texts: Callable[[int, int], str], ids: range = range(1, 7)
) -> list[dict[str, Any]]:
    return [
        {
            "question_id": number,
            "answer_id": f"{model}-{number}",
            "model_id": model,
            "choices": [{"index": 0, "turns": [texts(number, 1), texts(number, 2)]}],
            "tstamp": 0.0,
        }
        for number in ids
    ]


@pytest.fixture
def data(tmp_path: Path, write_rows: Callable[..., Path]) -> Path:
    """Six questions in FastChat's folder layout, two of a category."""
    folder = tmp_path / "data"
    questions = [
        {"question_id": n, "category": CATEGORIES[n % 3], "turns": [f"first {n}?", f"second {n}?"]}
        for n in range(1, 7)
    ]
    write_rows(folder / "mt_bench" / "question.jsonl", questions)
    write_rows(folder / "judge_prompts.jsonl", templates())
    references = answer_rows("gpt-4", lambda n, turn: f"reference {n}.{turn}")
    write_rows(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl", references)
    return folder


def test_each_turn_gets_the_prompt_of_its_category_and_its_reference(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
) -> None:
    answers = write_rows(
        tmp_path / "m.jsonl", answer_rows("m", lambda n, turn: f"answer {n}.{turn} {{braces}}")
    )
    judge_benchmark("mt-bench", data, answers, tmp_path / "out", options(judge_double))
    asked = {(body["messages"][0]["content"], body["messages"][1]["content"]) for body in judge_double.bodies}
    assert len(asked) == 12
    assert ("judge by single-v1", "q first 2? a answer 2.1 {braces}") in asked
    assert (
        "judge by single-v1-multi-turn",
        "q first 2? a answer 2.1 {braces} q second 2? a answer 2.2 {braces}",
    ) in asked
    assert ("judge by single-math-v1", "ref reference 1.1 q first 1? a answer 1.1 {braces}") in asked
    assert (
        "judge by single-math-v1-multi-turn",
        "ref reference 1.1 reference 1.2 q first 1? a answer 1.1 {braces} q second 1? a answer 1.2 {braces}",
    ) in asked
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in judge_double.bodies} == {
        ("judge-1", 0.0, 2048)
    }


def test_scores_are_means_over_turns_and_a_reply_without_rating_is_dropped(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    answers = write_rows(tmp_path / "m.jsonl", answer_rows("vicuna", lambda n, turn: "x" * (10 * n + turn)))

    def say(body: dict[str, Any]) -> str:
        prompt = body["messages"][1]["content"]
        turn = 2 if "second" in prompt else 1
        number = int(re.findall(r"first (\d)", prompt)[0])
        if (number, turn) == (4, 2):
            return "I cannot rate this."
        return f"**Good.** Rating: [[{number + turn}]]"  # 1: 2, 3; 2: 3, 4; ... 6: 7, 8

    judge_double.say = say
    out = tmp_path / "out"
    scores = judge_benchmark("mt-bench", data, answers, out, options(judge_double))
    first, second = [2, 3, 4, 5, 6, 7], [3, 4, 5, 7, 8]  # turn 2 of question 4 (a 6) is missing
    assert scores["turn_1"] == pytest.approx(sum(first) / 6)
    assert scores["turn_2"] == pytest.approx(sum(second) / 5)
    assert scores["score"] == pytest.approx(sum(first + second) / 11)
    assert scores["if_failures_were_kept_as_-1"] == pytest.approx((sum(first + second) - 1) / 12)
    assert scores["excluded"] == {"parse_failed": 1} and scores["n"] == 11
    assert scores["categories"]["writing"]["score"] == pytest.approx((4 + 5 + 7 + 8) / 4)
    lengths = [10 * n + turn for n in range(1, 7) for turn in (1, 2) if (n, turn) != (4, 2)]
    assert scores["mean_answer_chars"] == pytest.approx(sum(lengths) / 11)
    assert scores["judge"]["versions"] == {"judge-2026-01": 12}

    official = rows_of(out / "model_judgment" / "judge-1_single.jsonl")
    assert set(official[0]) == {
        "question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"
    }  # fmt: skip
    assert official[0]["judge"] == ["judge-1", "single-math-v1"] and official[0]["model"] == "vicuna"
    assert [row["score"] for row in official if row["question_id"] == 4] == [5, -1]
    results = rows_of(out / "results.jsonl")
    assert [row["id"] for row in results[:3]] == ["1/1", "1/2", "2/1"]
    assert results[7] == {
        "id": "4/2", "question_id": 4, "category": "math", "score": None, "answer_chars": 42,
        "status": "parse_failed", "turn": 2,
    }  # fmt: skip


def test_published_means_come_out_of_their_sums(
    tmp_path: Path, judge_double: Any, write_rows: Callable[..., Path], options: Callable[..., JudgeOptions]
) -> None:
    """160 judgments with one failure and a sum of 1392.5: 8.7579, and 8.6969 when the -1 is kept (PAPER.md 8)."""
    data = tmp_path / "data"
    questions = [{"question_id": n, "category": "stem", "turns": ["a?", f"second {n}?"]} for n in range(80)]
    write_rows(data / "question.jsonl", questions)
    write_rows(data / "judge_prompts.jsonl", templates())
    answers = write_rows(tmp_path / "m.jsonl", answer_rows("m", lambda n, turn: f"{n}.{turn}", range(80)))
    ratings = ["9"] * 120 + ["8"] * 38 + ["8.5"] + ["none"]  # 1080 + 304 + 8.5 = 1392.5
    assert sum(float(value) for value in ratings[:-1]) == 1392.5

    def say(body: dict[str, Any]) -> str:
        number, turn = re.findall(r"(\d+)\.(\d)", body["messages"][1]["content"])[-1]
        return f"Rating: [[{ratings[2 * int(number) + int(turn) - 1]}]]"

    judge_double.say = say
    scores = judge_benchmark("mt-bench", data, answers, tmp_path / "out", options(judge_double))
    assert round(scores["score"], 4) == 8.7579
    assert round(scores["if_failures_were_kept_as_-1"], 4) == 8.6969


def test_pairs_are_judged_in_both_orders_and_disagreement_is_a_tie(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    ours = write_rows(tmp_path / "ours.jsonl", answer_rows("ours", lambda n, turn: f"ours-{n}.{turn}"))
    theirs = write_rows(
        tmp_path / "theirs.jsonl", answer_rows("theirs", lambda n, turn: f"theirs-{n}.{turn}")
    )

    def say(body: dict[str, Any]) -> str:
        prompt = body["messages"][1]["content"]
        number = int(re.findall(r"ours-(\d)", prompt)[0])
        ours_is_a = "A ours" in prompt
        if number == 1:  # always ours
            return "[[A]]" if ours_is_a else "[[B]]"
        if number == 2:  # always theirs
            return "[[B]]" if ours_is_a else "[[A]]"
        if number == 3:  # whatever stands first
            return "[[A]]"
        if number == 4:
            return "[[C]]"
        if number == 5:  # a tie in one order only
            return "[[C]]" if ours_is_a else "[[A]]"
        return "[[A]]" if ours_is_a else "no verdict"

    judge_double.say = say
    out = tmp_path / "out"
    scores = judge_benchmark("mt-bench", data, ours, out, options(judge_double, baseline=theirs))
    assert len(judge_double.bodies) == 24
    assert (scores["win"], scores["loss"], scores["tie"]) == (2, 2, 6)
    assert scores["excluded"] == {"parse_failed": 2}
    assert scores["inconsistent"] == 4
    assert scores["score"] == scores["win_rate_adjusted"] == pytest.approx((2 + 3) / 10)
    assert scores["win_rate"] == pytest.approx(0.2)
    official = {
        (row["question_id"], row["turn"]): row
        for row in rows_of(out / "model_judgment" / "judge-1_pair.jsonl")
    }
    assert (official[2, 1]["g1_winner"], official[2, 1]["g2_winner"]) == ("model_2", "model_2")
    assert (official[3, 2]["g1_winner"], official[3, 2]["g2_winner"]) == ("model_1", "model_2")
    assert (official[6, 1]["g1_winner"], official[6, 1]["g2_winner"]) == ("model_1", "error")
    assert official[1, 1]["judge"] == ["judge-1", "pair-math-v1"]
    assert (official[1, 1]["model_1"], official[1, 1]["model_2"]) == ("ours", "theirs")


def test_repeated_answers_count_once_and_the_last_one_counts(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
) -> None:
    rows = answer_rows("m", lambda n, turn: "old") + answer_rows("m", lambda n, turn: "newer", range(2, 4))
    answers = write_rows(tmp_path / "m.jsonl", rows)
    scores = judge_benchmark("mt-bench", data, answers, tmp_path / "out", options(judge_double))
    assert scores["duplicate_answers"] == 2 and scores["n"] == 12
    assert sum("newer" in prompt for prompt in judge_double.prompts) == 4


def test_missing_answers_are_refused_unless_partial(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
) -> None:
    answers = write_rows(tmp_path / "m.jsonl", answer_rows("m", lambda n, turn: "x", range(1, 4)))
    with pytest.raises(UserError, match=r"m\.jsonl: wanted an answer to each of 6 questions, got none to 3"):
        judge_benchmark("mt-bench", data, answers, tmp_path / "out", options(judge_double))
    scores = judge_benchmark("mt-bench", data, answers, tmp_path / "out", options(judge_double, partial=True))
    assert scores["n"] == 6 and scores["missing"] == 3 and scores["unknown"] == 0
    assert "questions without an answer, not in the score: 3" in score_lines(scores)


def test_answers_to_no_question_are_counted_and_a_limit_takes_the_first(
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
) -> None:
    rows = answer_rows("m", lambda n, turn: "x") + [{"question_id": 999, "choices": [{"turns": ["x", "y"]}]}]
    answers = write_rows(tmp_path / "m.jsonl", rows)
    scores = judge_benchmark("mt-bench", data, answers, tmp_path / "all", options(judge_double))
    assert (scores["n"], scores["missing"], scores["unknown"]) == (12, 0, 1)
    assert "answers that belong to no question: 1" in score_lines(scores)
    judge_double.bodies.clear()
    scores = judge_benchmark("mt-bench", data, answers, tmp_path / "two", options(judge_double, limit=2))
    assert (scores["n"], scores["missing"], scores["unknown"]) == (4, 0, 1) and len(judge_double.bodies) == 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda d, a: (d / "judge_prompts.jsonl").unlink(),
            "wanted the judge prompts as judge_prompts.jsonl",
        ),
        (lambda d, a: (d / "mt_bench" / "question.jsonl").unlink(), "wanted the questions as question.jsonl"),
        (lambda d, a: (d / "mt_bench/reference_answer/gpt-4.jsonl").unlink(), "wanted reference answers"),
        (lambda d, a: a.write_text("{}\n"), "m.jsonl line 1: question_id: wanted a string or a whole number"),
        (
            lambda d, a: a.write_text('{"question_id": 1, "choices": []}\n'),
            "m.jsonl line 1: choices: wanted a list",
        ),
        (
            lambda d, a: a.write_text('{"question_id": 1, "choices": [{"turns": ["x", 3]}]}\n'),
            "m.jsonl line 1: turns: wanted a list of strings",
        ),
        (lambda d, a: a.write_text('{"question_id": 1, "cho'), "m.jsonl line 1: row: wanted a JSON object"),
        (lambda d, a: a.write_bytes(b"\xff\xfe{"), "m.jsonl line 1: row: wanted UTF-8"),
        (lambda d, a: a.unlink(), "--answers: wanted a file, got nothing"),
        (
            lambda d, a: (d / "judge_prompts.jsonl").write_text(
                (d / "judge_prompts.jsonl").read_text().replace("{answer}", "{answers}")
            ),
            "judge_prompts.jsonl: wanted a prompt with",
        ),
    ],
)
def test_a_broken_file_is_named_in_one_line(
    break_it: Callable[[Path, Path], Any],
    message: str,
    data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
) -> None:
    answers = write_rows(tmp_path / "m.jsonl", answer_rows("m", lambda n, turn: "x"))
    break_it(data, answers)
    with pytest.raises(UserError) as error:
        judge_benchmark("mt-bench", data, answers, tmp_path / "out", options(judge_double))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert judge_double.bodies == []


def test_the_real_files_ask_160_questions(
    shared_data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    folder = shared_data / "mt_bench"
    questions = rows_of(folder / "mt_bench__question.jsonl")
    ids = [row["question_id"] for row in questions]
    answers = write_rows(
        tmp_path / "m.jsonl", [answer_rows("m", lambda n, turn: "{x}", range(n, n + 1))[0] for n in ids]
    )
    scores = judge_benchmark("mt-bench", folder, answers, tmp_path / "out", options(judge_double))
    assert scores["n"] == 160 and scores["score"] == 5
    assert len(scores["categories"]) == 8 and {c["n"] for c in scores["categories"].values()} == {20}
    with_reference = [prompt for prompt in judge_double.prompts if "Reference" in prompt]
    assert len(with_reference) == 60
