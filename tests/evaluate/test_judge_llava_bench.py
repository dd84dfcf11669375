"""LLaVA-Bench through a judge: what is asked, what counts, and the official file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError
from fasttrain.evaluate.judging import JudgeOptions, judge_benchmark

# the system message of llava/eval/eval_gpt_review_bench.py in github.com/haotian-liu/LLaVA
OFFICIAL = "You are a helpful and precise assistant for checking the quality of the answer."


@pytest.fixture
def llava(tmp_path: Path, write_rows: Callable[..., Path]) -> Path:
    folder = tmp_path / "llava"
    categories = ("conv", "detail", "complex")
    questions = [
        {
            "question_id": n,
            "image": f"{n // 3:03}.jpg",
            "text": f"question {n}",
            "category": categories[n % 3],
        }
        for n in range(6)
    ]
    write_rows(folder / "questions.jsonl", questions)
    contexts = [{"id": n, "image": f"{n:03}.jpg", "caption": f"a picture of {n}"} for n in range(2)]
    write_rows(folder / "context.jsonl", contexts)
    references = [
        {"question_id": n, "text": f"reference {n}", "answer_id": f"gpt-{n}"} for n in reversed(range(6))
    ]
    write_rows(folder / "answers_gpt4.jsonl", references)
    rules = {
        f"llava_bench_{name}": {"role": "Assistant", "prompt": f"rule for {name}"} for name in categories
    }
    (folder / "rule.json").write_text(json.dumps(rules))
    answers = [
        {
            "question_id": n,
            "prompt": "",
            "text": "y" * n,
            "answer_id": f"m-{n}",
            "model_id": "llava-x",
            "metadata": {},
        }
        for n in range(6)
    ]
    write_rows(tmp_path / "answers.jsonl", answers)
    return folder


def test_llava_bench_score_is_the_ratio_of_the_two_means_without_parse_failures(
    llava: Path,
    tmp_path: Path,
    judge_double: Any,
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    replies = {
        0: "8 6\nwhy",
        1: "10 7\nwhy",
        2: "9,9\nwhy",
        3: "8, 4\nwhy",
        4: "10 5",
        5: "The first one wins.",
    }

    def say(body: dict[str, Any]) -> str:
        return replies[int(re.findall(r"question (\d)", body["messages"][1]["content"])[0])]

    judge_double.say = say
    out = tmp_path / "out"
    scores = judge_benchmark("llava-bench", llava, tmp_path / "answers.jsonl", out, options(judge_double))
    assert scores["score"] == pytest.approx(100 * (6 + 7 + 9 + 5) / (8 + 10 + 9 + 10))
    assert scores["categories"]["conv"]["score"] == pytest.approx(75)
    assert scores["categories"]["detail"]["score"] == pytest.approx(100 * 12 / 20)
    assert scores["excluded"] == {"parse_failed": 2} and scores["n"] == 4
    kept = 100 * (6 + 7 + 9 + 5 - 2) / (8 + 10 + 9 + 10 - 2)
    assert scores["if_parse_failures_were_kept_as_-1"] == pytest.approx(kept)
    assert scores["parse_failures_with_two_numbers"] == 1
    assert scores["if_those_were_read"] == pytest.approx(100 * (27 + 4) / (37 + 8))
    assert scores["mean_answer_chars"] == pytest.approx((0 + 1 + 2 + 4) / 4)

    prompt = next(prompt for prompt in judge_double.prompts if "question 4" in prompt)
    assert prompt == (
        "[Context]\na picture of 1\n\n[Question]\nquestion 4\n\n[Assistant 1]\nreference 4\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nyyyy\n\n[End of Assistant 2]\n\n[System]\nrule for detail\n\n"
    )
    assert {body["messages"][0]["content"] for body in judge_double.bodies} == {OFFICIAL}
    assert {(body["temperature"], body["max_tokens"]) for body in judge_double.bodies} == {(0.2, 1024)}
    official = rows_of(out / "reviews" / "llava-x.jsonl")
    assert official[3] == {
        "id": 4, "question_id": 3, "answer1_id": "gpt-3", "answer2_id": "m-3", "category": "llava_bench_conv",
        "content": "8, 4\nwhy", "tuple": [-1, -1],
    }  # fmt: skip
    assert official[0]["tuple"] == [8, 6]


def test_llava_bench_reads_the_real_coco_set_with_captions_boxes_and_rules(
    shared_data: Path,
    tmp_path: Path,
    judge_double: Any,
    write_rows: Callable[..., Path],
    options: Callable[..., JudgeOptions],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    folder = shared_data / "llava"
    questions = rows_of(folder / "qa90_questions.jsonl")
    answers = write_rows(
        tmp_path / "a.jsonl",
        [{"question_id": q["question_id"], "text": "A cat.", "model_id": "m"} for q in questions],
    )
    judge_double.say = lambda body: "8 4\nShort."
    scores = judge_benchmark("llava-bench", folder, answers, tmp_path / "out", options(judge_double))
    assert scores["score"] == 50 and scores["n"] == 90
    assert {name: group["n"] for name, group in scores["categories"].items()} == {
        "conv": 30, "detail": 30, "complex": 30
    }  # fmt: skip
    rules = json.loads((folder / "rule.json").read_text())
    assert all(
        any(rules[c]["prompt"] in p for c in ("conv", "detail", "complex")) for p in judge_double.prompts
    )
    assert all(re.search(r"\n\n\w[\w ]*: \[0\.\d+, ", prompt) for prompt in judge_double.prompts)


def test_judgments_made_under_another_system_message_are_asked_anew(
    llava: Path,
    tmp_path: Path,
    judge_double: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: Callable[..., JudgeOptions],
) -> None:
    judge_double.say = lambda body: "8 4" if body["messages"][0]["content"] == OFFICIAL else "8 8"
    words = ("llava-bench", llava, tmp_path / "answers.jsonl", tmp_path / "out", options(judge_double))
    monkeypatch.setattr("fasttrain.evaluate.judging.llava_bench.SYSTEM", "Compare.")
    before = judge_benchmark(*words)
    monkeypatch.undo()
    after = judge_benchmark(*words)
    assert (before["score"], after["score"], len(judge_double.bodies)) == (100, 50, 12)
    assert (before["judge_system"], after["judge_system"]) == ("Compare.", OFFICIAL)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "rule.json").unlink(), "wanted the judge's rules as rule.json"),
        (lambda f: (f / "rule.json").write_text("{}"), "rule.json: wanted the rule 'llava_bench_conv'"),
        (lambda f: (f / "rule.json").write_text('{"a": 1}'), "rule.json: a: wanted"),
        (
            lambda f: (f / "context.jsonl").write_text('{"image": "9.jpg", "caption": "x"}\n'),
            "questions.jsonl line 1: image",
        ),
        (
            lambda f: (f / "answers_gpt4.jsonl").write_text('{"question_id": 0, "text": "x"}\n'),
            "to question 1, got none",
        ),
    ],
)
def test_broken_llava_files_are_named(
    break_it: Callable[[Path], Any],
    message: str,
    llava: Path,
    tmp_path: Path,
    judge_double: Any,
    options: Callable[..., JudgeOptions],
) -> None:
    break_it(llava)
    with pytest.raises(UserError) as error:
        judge_benchmark(
            "llava-bench", llava, tmp_path / "answers.jsonl", tmp_path / "out", options(judge_double)
        )
    assert message in str(error.value) and "\n" not in str(error.value)
