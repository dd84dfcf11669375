"""The judged benchmarks: official question files in, official answer files out, and the judge at the end of the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain.evaluate.benchmarks import ReadOptions, find_benchmark
from fasttrain.evaluate.command import NAMES


@pytest.mark.parametrize("bench", NAMES)
def test_an_empty_data_folder_says_what_to_download_and_where_to_put_it(
    bench: str, tmp_path: Path, tiny_llava: Path, fasttrain: Callable[..., Any]
) -> None:
    code, _, err = fasttrain("eval", bench, "-m", tiny_llava, "--data", tmp_path, "-o", tmp_path / "e")
    assert code == 2 and err.count("\n") == 1 and str(tmp_path) in err
    assert "github.com/" in err or "huggingface.co/" in err or "https://" in err


def test_mt_bench_writes_fastchats_layout_from_the_real_questions(
    shared_data: Path, tmp_path: Path, tiny_text: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    out = tmp_path / "mt_bench"
    words = ("eval", "mt-bench", "-m", tiny_text, "--data", shared_data / "mt_bench", "-o", out, "--limit", 3)
    code, text, _ = fasttrain(*words, "--max-new-tokens", 4, "--model-id", "org/tiny")
    rows = tiny_models.read_rows(out / "model_answer" / "org_tiny.jsonl")
    assert code == 0 and [row["question_id"] for row in rows] == [81, 82, 83]
    assert rows[0]["model_id"] == "org/tiny" and len(rows[0]["choices"][0]["turns"]) == 2
    assert "--judge MODEL" in text and "mean length" in text
    assert not (out / "scores.json").exists()


def test_category_temperatures_are_fastchats(shared_data: Path) -> None:
    data = shared_data / "mt_bench"
    read = find_benchmark("mt-bench").read
    questions = read(data, ReadOptions(category_temperatures=True))[""]
    found = {question.row["category"]: question.temperature for question in questions}
    assert found == {
        "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0,
        "stem": 0.1, "humanities": 0.1,
    }  # fmt: skip
    assert len(questions) == 80 and all(question.turns == 2 for question in questions)
    assert {question.temperature for question in read(data, ReadOptions())[""]} == {
        None
    }  # greedy, as the run says


def test_mm_vet_and_llava_bench_and_alpaca_eval_write_their_official_answers(
    tmp_path: Path, tiny_llava: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    for folder in ("mm", "lb"):
        tiny_models.draw_image(tmp_path / folder / "images" / "v1.png", seed=1)
    asked = {
        f"v1_{n}": {"imagename": "v1.png", "question": f"q{n}?", "answer": "a", "capability": ["ocr"]}
        for n in range(2)
    }
    (tmp_path / "mm" / "mm-vet.json").write_text(json.dumps(asked))
    row = {"question_id": 4, "image": "v1.png", "text": "the chart?", "category": "conv"}
    tiny_models.write_rows(tmp_path / "lb" / "questions.jsonl", [row])
    (tmp_path / "ae").mkdir()
    instructions = [
        {"instruction": f"say {n}", "output": "x", "generator": "g", "dataset": "koala"} for n in range(3)
    ]
    (tmp_path / "ae" / "alpaca_eval.json").write_text(json.dumps(instructions))
    for bench, data in (("mm-vet", "mm"), ("llava-bench", "lb"), ("alpaca-eval", "ae")):
        words = (
            "-m",
            tiny_llava,
            "--data",
            tmp_path / data,
            "-o",
            tmp_path / "out" / data,
            "--max-new-tokens",
            3,
        )
        assert fasttrain("eval", bench, *words)[0] == 0
    texts = json.loads((tmp_path / "out" / "mm" / "tiny-llava.json").read_text())
    assert list(texts) == ["v1_0", "v1_1"] and all(isinstance(text, str) for text in texts.values())
    (given,) = tiny_models.read_rows(tmp_path / "out" / "lb" / "tiny-llava.jsonl")
    assert (given["question_id"], given["prompt"], given["category"]) == (4, "the chart?", "conv")
    outputs = json.loads((tmp_path / "out" / "ae" / "model_outputs.json").read_text())
    assert [set(output) for output in outputs] == [{"instruction", "output", "generator", "dataset"}] * 3
    assert [output["instruction"] for output in outputs] == ["say 0", "say 1", "say 2"]
    assert {output["generator"] for output in outputs} == {"tiny-llava"}


def test_an_empty_answer_file_is_a_mistake_before_any_judge(
    shared_data: Path, tmp_path: Path, fasttrain: Callable[..., Any]
) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.touch()
    words = (
        "eval",
        "mt-bench",
        "--data",
        shared_data / "mt_bench",
        "--answers",
        answers,
        "-o",
        tmp_path / "e",
    )
    code, _, err = fasttrain(*words)
    assert code == 2 and "wanted at least one answer" in err


def test_a_judge_scores_at_the_end_and_length_stands_beside_the_score(
    shared_data: Path, tmp_path: Path, tiny_text: Path, fasttrain: Callable[..., Any], judge_double: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    judge_double.say = lambda body: "Fine. Rating: [[7]]"
    out = tmp_path / "e"
    judge = ("--judge", "j", "--judge-api", "openai", "--judge-url", judge_double.url)
    words = ("eval", "mt-bench", "-m", tiny_text, "--data", shared_data / "mt_bench", "-o", out, "--limit", 2)
    code, text, _ = fasttrain(*words, "--max-new-tokens", 4, *judge, "--judge-dry-run")
    assert code == 0 and "judge: 4 calls" in text and not (out / "scores.json").exists()
    code, text, err = fasttrain(*words, "--max-new-tokens", 4, *judge)
    assert code == 0, err
    scores = json.loads((out / "scores.json").read_text())
    assert scores["score"] == 7.0 and scores["n"] == 4
    assert ": 7 (n 4, mean answer" in text
    answers = out / "model_answer" / "tiny-text.jsonl"
    again = (
        "eval",
        "mt-bench",
        "--data",
        shared_data / "mt_bench",
        "--answers",
        answers,
        "-o",
        tmp_path / "f",
    )
    code, text, _ = fasttrain(*again, *judge, "--partial")
    assert code == 3 and "questions without an answer, not in the score: 78" in text
    assert json.loads((tmp_path / "f" / "scores.json").read_text())["score"] == 7.0


def test_help_answers_without_torch(fasttrain: Callable[..., Any]) -> None:
    import subprocess

    code = (
        "import sys; sys.argv = ['fasttrain', 'eval', '--help']\n"
        "from fasttrain import cli\ntry: cli.main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "official answer files" in done.stdout


def test_what_contradicts_itself_is_refused(
    tmp_path: Path, shared_data: Path, fasttrain: Callable[..., Any]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "yes"}\n')
    words = ("eval", "pope", "--data", shared_data / "pope", "-o", tmp_path / "e")
    for more, message in (
        ((), "-m: wanted a model (or --answers FILE), got none"),
        (("-m", "x", "--answers", tmp_path / "a.jsonl"), "--answers and -m: wanted one of them, got both"),
        (("-a", "x", "--answers", tmp_path / "a.jsonl"), "--answers and -a: wanted one of them, got both"),
        (
            ("--temperature", "0", "--answers", tmp_path / "a.jsonl"),
            "--answers and --temperature: wanted one",
        ),
        (
            ("--max-cost", "1", "--answers", tmp_path / "a.jsonl"),
            "--max-cost: wanted with --judge, got it alone",
        ),
        (("--answers", tmp_path / "none"), "--answers: wanted a file, got nothing"),
        (("--answers", f"random={tmp_path / 'a.jsonl'}"), "--answers: wanted adversarial=FILE, got random="),
        (("--answers", tmp_path / "a.jsonl") * 2, "--answers: wanted one file for adversarial"),
        (("-m", "no/such/model"), "pope/val2014 (or give --images)"),
    ):
        code, _, err = fasttrain(*words, *more)
        assert code == 2 and message in err and err.count("\n") == 1


def test_an_option_that_a_benchmark_has_no_use_for_is_refused(
    tmp_path: Path, fasttrain: Callable[..., Any]
) -> None:
    (tmp_path / "file").write_text("x")
    words = ("--data", tmp_path, "-o", tmp_path / "e", "--answers", tmp_path / "file")
    for bench, option, message in (
        ("mmbench", ("--judge", "x"), "--judge: wanted with mt-bench or mm-vet or llava-bench or alpaca-eval, got it with mmbench"),
        ("llava-bench", ("--judge-prompt", tmp_path / "file"), "--judge-prompt: wanted with mm-vet or alpaca-eval, got it with llava-bench"),
        ("mm-vet", ("--baseline", tmp_path / "file"), "--baseline: wanted with mt-bench or alpaca-eval, got it with mm-vet"),
        ("pope", ("--category-temperatures",), "--category-temperatures: wanted with mt-bench, got it with pope"),
    ):  # fmt: skip
        code, _, err = fasttrain("eval", bench, *words, *option)
        assert code == 2 and message in err and err.count("\n") == 1


def test_the_coco_set_of_llava_bench_wants_cocos_images(
    shared_data: Path, tmp_path: Path, fasttrain: Callable[..., Any]
) -> None:
    words = ("eval", "llava-bench", "-m", "x", "--data", shared_data / "llava", "-o", tmp_path / "e")
    code, _, err = fasttrain(*words)
    assert code == 2 and "images.cocodataset.org" in err and "000000441147.jpg first" in err
