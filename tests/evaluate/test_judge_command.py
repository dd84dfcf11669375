"""`fasttrain eval BENCH --answers FILE --judge MODEL`: the whole way from files to scores, page and exit code."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain import cli


@pytest.fixture
def fasttrain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fasttrain", *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code or 0
        captured = capsys.readouterr()
        return int(code), captured.out, captured.err

    return run


@pytest.fixture
def llava(tmp_path: Path, write_rows: Callable[..., Path]) -> Path:
    folder = tmp_path / "data"
    questions = [
        {"question_id": n, "image": "1.jpg", "text": f"question {n}.", "category": "conv"} for n in range(8)
    ]
    write_rows(folder / "questions.jsonl", questions)
    write_rows(folder / "context.jsonl", [{"id": 0, "image": "1.jpg", "caption": "a cat"}])
    write_rows(
        folder / "answers_gpt4.jsonl",
        [{"question_id": n, "text": "reference", "answer_id": "r"} for n in range(8)],
    )
    (folder / "rule.json").write_text(
        json.dumps({"llava_bench_conv": {"role": "Assistant", "prompt": "Rate."}})
    )
    for name, text in (("base", "short"), ("dpo", "a longer answer")):
        rows = [{"question_id": n, "text": text, "answer_id": name, "model_id": name} for n in range(8)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return folder


def test_two_models_are_judged_and_compared(
    llava: Path, tmp_path: Path, judge_double: Any, fasttrain: Callable[..., tuple[int, str, str]]
) -> None:
    def say(body: dict[str, Any]) -> str:
        prompt = body["messages"][-1]["content"]
        number = int(re.findall(r"question (\d)", prompt)[0])
        return (
            f"8 {(6 if 'longer' in prompt else 4) + number % 3}\nBecause." if number else "Neither is good."
        )

    judge_double.say = say
    shared = ("--data", llava, "--judge", "judge-1", "--judge-api", "openai", "--judge-url", judge_double.url)
    asked = {}
    for name in ("base", "dpo"):
        words = (
            "eval",
            "llava-bench",
            "--answers",
            tmp_path / f"{name}.jsonl",
            "-o",
            tmp_path / "eval" / name,
            *shared,
        )
        code, out, _ = fasttrain(*words, "--judge-dry-run")
        assert code == 0 and "judge: 8 calls" in out and "unknown price" in out
        assert not list((tmp_path / "eval" / name).iterdir())
        code, out, err = fasttrain(*words)
        assert code == 3, err
        asked[name] = out
        told = json.loads((tmp_path / "eval" / name / "scores.json").read_text())
        assert told["benchmark"] == "llava-bench" and told["model"] == name and told["n"] == 7
    assert len(judge_double.bodies) == 16
    marks = [4 + n % 3 for n in range(1, 8)]
    score = 100 * sum(marks) / 56
    assert f"score: {score:.4g} (n 7, mean answer 5 characters)" in asked["base"]
    assert f"conv: {score:.4g} (n 7, mean answer 5 characters)" in asked["base"]
    assert "left out: 1 parse_failed" in asked["base"]
    kept = 100 * (sum(marks) - 1) / 55
    assert f"with unreadable reviews kept as -1, as LLaVA's summary does: {kept:.4g}" in asked["base"]
    code, out, _ = fasttrain("compare", tmp_path / "eval", "-o", tmp_path / "page", "--resamples", 200)
    assert code == 0
    assert re.search(r"^LLaVA-Bench, % of reference +dpo +\+25\.0 +\+25\.0 to \+25\.0", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-cost", "nan"), ("--judge-temperature", "nan"), ("--judge-timeout", "1e12"), ("--backoff", "inf"),
     ("--temperature", "nan"), ("--top-p", "nan"), ("--rpm", "nan"), ("--timeout", "1e12")],
)  # fmt: skip
def test_a_number_that_is_none_or_no_socket_can_wait_is_refused(
    tmp_path: Path, fasttrain: Callable[..., Any], option: str, value: str
) -> None:
    """`--max-cost nan` was no cap at all."""
    answers = tmp_path / "answers.jsonl"
    words = ("eval", "mt-bench", "--data", tmp_path, "--answers", answers, "-o", tmp_path / "out")
    code, _, said = fasttrain(*words, option, value)
    assert code == 2 and f"Invalid value for '{option}'" in said


def test_a_missing_judge_file_is_one_line_and_exit_code_2(
    llava: Path, tmp_path: Path, judge_double: Any, fasttrain: Callable[..., tuple[int, str, str]]
) -> None:
    (llava / "rule.json").unlink()
    code, out, err = fasttrain(
        "eval", "llava-bench", "--data", llava, "--answers", tmp_path / "base.jsonl", "-o", tmp_path / "out",
        "--judge", "judge-1", "--judge-api", "openai", "--judge-url", judge_double.url,
    )  # fmt: skip
    assert code == 2 and out == "" and err.count("\n") == 1
    assert (
        "wanted the judge's rules as rule.json, got no such file; it is llava/eval/table/rule.json of" in err
    )


def test_scores_stay_beside_the_answers_they_are_of_and_beside_no_others(
    tmp_path: Path, tiny_text: Path, shared_data: Path, judge_double: Any,
    fasttrain: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    judge_double.say = lambda body: "Rating: [[7]]"
    out, model = tmp_path / "e", tmp_path / "model"
    shutil.copytree(tiny_text, model)
    judge = ("--judge", "j", "--judge-api", "openai", "--judge-url", judge_double.url)
    words = ("eval", "mt-bench", "-m", model, "--data", shared_data / "mt_bench", "-o", out, "--limit", 2)
    words = (*words, "--max-new-tokens", 4)
    assert fasttrain(*words, *judge)[0] == 0
    kept = [(out / name).read_bytes() for name in ("scores.json", "results.jsonl")]
    code, _, err = fasttrain(*words)  # the same answers, no judge
    assert code == 0 and "removed" not in err
    assert [(out / name).read_bytes() for name in ("scores.json", "results.jsonl")] == kept
    before = (out / "model_answer" / "model.jsonl").read_bytes()

    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(weights | {name: -3 * weights[name]}, model / "model.safetensors", {"format": "pt"})
    code, _, err = fasttrain(*words)
    assert (out / "model_answer" / "model.jsonl").read_bytes() != before
    assert code == 0 and f"note: the scores in {out} were of other answers" in err
    assert not list(out.glob("scores.json*")) and not list(out.glob("results.jsonl*"))
    code, _, err = fasttrain("compare", out, "-o", tmp_path / "page")
    assert code == 2 and "wanted scores.json" in err


def test_a_judge_that_fails_leaves_no_scores_of_another_answer_file(
    llava: Path, tmp_path: Path, judge_double: Any, fasttrain: Callable[..., tuple[int, str, str]]
) -> None:
    judge_double.say = lambda body: "8 6"
    out = tmp_path / "out"
    judge = ("--judge", "judge-1", "--judge-api", "openai", "--judge-url", judge_double.url)

    def run(name: str, *more: str) -> int:
        answers = tmp_path / f"{name}.jsonl"
        return fasttrain(
            "eval", "llava-bench", "--data", llava, "--answers", answers, "-o", out, *judge, *more
        )[0]

    assert run("base") == 0 and (out / "scores.json").is_file()
    judge_double.fault = lambda body, attempt: 401
    assert run("base") == 0 and run("dpo", "--judge-dry-run") == 0 and (out / "scores.json").is_file()
    assert run("dpo") == 2
    assert not (out / "scores.json").exists() and not (out / "results.jsonl").exists()
