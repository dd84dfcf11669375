"""Scores judged under other prompts or rules, which lie beside the questions, tell so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.evaluate.comparing.analysis import compare
from fasttrain.evaluate.comparing.folders import read_evaluations
from fasttrain.evaluate.judging import judge_benchmark
from fasttrain.files import write_json

Rows = Callable[[Path, list[dict[str, Any]]], object]


def mt_bench(folder: Path, told: str, write_rows: Rows) -> None:
    names = [f"{base}{end}" for base in ("single-v1", "single-math-v1") for end in ("", "-multi-turn")]
    prompts = [
        {"name": name, "system_prompt": told, "prompt_template": "{question} {answer}"} for name in names
    ]
    questions = [{"question_id": n, "category": "stem", "turns": [f"question {n}"]} for n in range(4)]
    write_rows(folder / "question.jsonl", questions)
    write_rows(folder / "judge_prompts.jsonl", prompts)
    write_rows(
        folder / "answers.jsonl", [{"question_id": n, "choices": [{"turns": ["a"]}]} for n in range(4)]
    )


def llava_bench(folder: Path, told: str, write_rows: Rows) -> None:
    kinds = ("conv", "detail", "complex")
    questions = [{"question_id": n, "image": "0.jpg", "text": "q", "category": "conv"} for n in range(4)]
    write_rows(folder / "questions.jsonl", questions)
    write_rows(folder / "context.jsonl", [{"id": 0, "image": "0.jpg", "caption": "c"}])
    write_rows(folder / "answers_gpt4.jsonl", [{"question_id": n, "text": "r"} for n in range(4)])
    rules = {f"llava_bench_{kind}": {"role": "Assistant", "prompt": told} for kind in kinds}
    (folder / "rule.json").write_text(json.dumps(rules), encoding="utf-8")
    write_rows(folder / "answers.jsonl", [{"question_id": n, "text": "y"} for n in range(4)])


@pytest.mark.parametrize(
    ("bench", "write", "reply"),
    [("mt-bench", mt_bench, "[[9]]"), ("llava-bench", llava_bench, "8 8")],
)
def test_prompts_beside_the_questions_are_compared(
    bench: str, write: Callable[..., None], reply: str, tmp_path: Path, write_rows: Rows, judge_double: Any,
    options: Callable[..., Any],
) -> None:  # fmt: skip
    judge_double.say = lambda body: reply
    outputs = []
    for number, told in enumerate(("be kind", "be kind", "be harsh")):
        folder, out = tmp_path / f"data{number}", tmp_path / f"out{number}"
        write(folder, told, write_rows)
        write_json(
            out / "scores.json",
            judge_benchmark(bench, folder, folder / "answers.jsonl", out, options(judge_double)),
        )
        outputs.append(f"{out.name}={out}")

    def warnings(*compared: str) -> str:
        return "".join(compare(read_evaluations(list(compared)), resamples=50).warnings)

    assert "the judge's prompt" not in warnings(*outputs[:2])
    assert "the judge's prompt" in warnings(*outputs[1:])
