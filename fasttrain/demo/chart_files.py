"""Questions about charts as a file, with the PNG images beside it."""

import itertools
import json
from pathlib import Path

from fasttrain.demo.charts import Example, Split, examples

YES_NO_KINDS = ("present", "compare")


def write_questions(folder: Path, prompts: int, seed: int, split: Split) -> Path:
    """Writes `questions.jsonl`: an image, a question about it, the right answer and the kind of question."""
    lines = []
    for i, example in enumerate(itertools.islice(examples(seed, split), prompts)):
        lines.append(
            {
                "id": f"{split}-{seed}-{i}",
                "image": _write_image(folder, i, example),
                "question": example.question.text,
                "answer": example.question.answer,
                "kind": example.question.kind,
                "source": "charts",
            }
        )
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_pope(folder: Path, questions: int, seed: int, split: Split) -> Path:
    """Writes yes-or-no questions in POPE's form, `charts_pope_SPLIT.json` with images beside it; returns the folder."""
    asked = (e for e in examples(seed, split) if e.question.kind in YES_NO_KINDS)
    lines = [
        {
            "question_id": i + 1,
            "image": Path(_write_image(folder, i, example)).name,
            "text": example.question.text,
            "label": "yes" if example.question.answer.startswith("Yes") else "no",
        }
        for i, example in enumerate(itertools.islice(asked, questions))
    ]
    path = folder / f"charts_pope_{split}.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def _write_image(folder: Path, i: int, example: Example) -> str:
    """Saves the chart's image and returns its path relative to the folder."""
    path = folder / "images" / f"{i:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    example.chart.image().save(path)
    return path.relative_to(folder).as_posix()
