"""A study file of every kind of run, and what it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttrain.study.spec import Study, load_study
from fasttrain.study.tasks import tasks_of

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


@pytest.fixture
def make_up() -> Callable[[Study], None]:
    """The files and notes of all of a study's steps, 90 s each, but for answers and scores."""

    def make(study: Study) -> None:
        for task in tasks_of(study):
            task.note.parent.mkdir(parents=True, exist_ok=True)
            task.note.write_text(json.dumps({"command": task.shown, "seconds": 90.0}))
            if task.kind == "data":
                task.output.parent.mkdir(parents=True, exist_ok=True)
                task.output.write_text("")
            elif task.kind == "train":
                task.output.mkdir(parents=True)
                used = 10 if "10pairs" in task.subject else 77
                facts = json.dumps({"pairs": used, "versions": {"torch": "2"}})
                (task.output.parent / "environment.json").write_text(facts)
                (task.output.parent / "metrics.jsonl").write_text('{"step": 9, "loss": 0.5}\n')
            elif task.kind == "evaluate":
                task.output.parent.mkdir(parents=True)

    return make


@pytest.fixture
def finished(study_file: Any, make_up: Callable[[Study], None]) -> Any:
    """A study whose commands have run, by their files: `right` questions right of 40, by run."""
    runs = [{"method": ["dpo", "sft"]}, {"pairs": [10]}, {"flip": 0.5}, {"model": "big"}]
    study = load_study(
        study_file(runs=runs, evaluate={"held": {"questions": "q.jsonl"}}, usd_per_hour=3.6, watts=100)
    )
    right = {
        "base": 10,
        "dpo": 30,
        "sft": 12,
        "dpo-10pairs": 20,
        "dpo-flip50": 4,
        "base-big": 20,
        "dpo-big": 36,
    }
    make_up(study)
    for task in (task for task in tasks_of(study) if task.kind == "evaluate"):
        rows = [
            (f"q{n}", f"because {n}" if n < right[task.subject] else "<script>no</script>") for n in range(40)
        ]
        task.output.write_text("".join(json.dumps({"question_id": q, "text": t}) + "\n" for q, t in rows))
    return study
