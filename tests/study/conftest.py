"""A study file of every kind of run, and what it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE: dict[str, Any] = {
    "output": "out",
    "recipe": "recipe.yaml",
    "models": {"small": "hub/small", "big": "hub/big"},
    "answers": {
        "big": {"annotations": "a.jsonl", "questions": "q.jsonl"},
        "small": {"annotations": "b.jsonl"},
    },
    "settings": {"all": {"train.epochs": 2}, "sft": {"train.learning_rate": 4e-4}},
    "runs": [
        {"method": ["dpo", "sft", "steerlm"]},
        {"method": "dpo", "pairs": [10, 20]},
        {"flip": [0, 0.25]},
        {"beta": 0.3, "model": ["small", "big"], "answers": ["big", "small"]},
    ],
    "evaluate": {"held": {"questions": "q.jsonl"}, "pope": {"benchmark": "pope", "data": "."}},
}


@pytest.fixture
def study_file(tmp_path: Path) -> Any:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"question": "Why?", "completions": [], "cost_usd": 0.5}\n' * 2)
    questions = [{"id": f"q{n}", "question": f"Why {n}?", "answer": f"because {n}"} for n in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "recipe.yaml").write_text("train: {max_steps: 3}\n")

    def write(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
        return path

    return write
