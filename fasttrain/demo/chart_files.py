"""Charts as files: preference pairs in TRL's vision format, and questions, with their PNG images beside them."""

import itertools
import json
from pathlib import Path
from typing import Any

from fasttrain.demo.charts import Example, Split, examples


def write_pairs(folder: Path, prompts: int, seed: int, split: Split = "train") -> Path:
    """Writes `pairs.jsonl`: for each of `prompts` questions the right answer against every wrong one.

    A question has three or four wrong answers, so as many lines share its prompt and its image.
    """
    lines = []
    for i, example in enumerate(itertools.islice(examples(seed, split), prompts)):
        image = _write_image(folder, i, example)
        for j, wrong in enumerate(example.question.wrong):
            lines.append(
                {
                    "id": f"{split}-{seed}-{i}-{j}",
                    "images": [image],
                    "prompt": [_user_turn(example.question.text)],
                    "chosen": [_assistant_turn(example.question.answer)],
                    "rejected": [_assistant_turn(wrong)],
                    "kind": example.question.kind,
                }
            )
    return _write_lines(folder / "pairs.jsonl", lines)


def write_questions(folder: Path, prompts: int, seed: int, split: Split = "held_out") -> Path:
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
    return _write_lines(folder / "questions.jsonl", lines)


def _write_image(folder: Path, i: int, example: Example) -> str:
    """Saves the chart's image and returns its path relative to the folder."""
    path = folder / "images" / f"{i:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    example.chart.image().save(path)
    return path.relative_to(folder).as_posix()


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _user_turn(question: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def _assistant_turn(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}
