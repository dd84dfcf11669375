"""Questions about charts as a file, with the PNG images beside it."""

import itertools
import json
from pathlib import Path

from fasttrain.demo.charts import Example, Split, examples


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


def _write_image(folder: Path, i: int, example: Example) -> str:
    """Saves the chart's image and returns its path relative to the folder."""
    path = folder / "images" / f"{i:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    example.chart.image().save(path)
    return path.relative_to(folder).as_posix()
