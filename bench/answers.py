"""Time greedy answers to several questions about each image: fasttrain's shared image prompts against `generate`.

    python bench/answers.py models/smollm2-llava --images ../shared/data/mmbench_samples --questions 6

Both run batches of the same size on the same model, one after the other, and must give the same texts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from fasttrain.answering.decoding import Decoding
from fasttrain.answering.generic import GenericGenerator
from fasttrain.answering.local import LocalModel, answer_in_batches, batch_budget
from fasttrain.answering.questions import Question, question_of
from fasttrain.config import ModelConfig
from fasttrain.environment import collect_facts

ASKED = ("person", "car", "dog", "chair", "cup", "bird", "tree", "clock", "boat", "table", "phone", "cat")


def questions_about(images: list[Path], each: int) -> list[Question]:
    """POPE's question about `each` objects, for every image."""
    rows = [
        {
            "question_id": f"{image.stem}-{word}",
            "image": image.name,
            "text": f"Is there a {word} in the image?",
        }
        for image in images
        for word in ASKED[:each]
    ]
    return [question_of(row, f"row {n}", images[0].parent, n) for n, row in enumerate(rows)]


def timed(
    generator: Any, model: LocalModel, questions: list[Question], tokens: int, rows: int
) -> tuple[float, dict[Any, str]]:
    texts: dict[Any, str] = {}
    start = time.perf_counter()
    answer_in_batches(
        generator, questions, model.images_of(questions), Decoding(max_new_tokens=tokens),
        batch_budget(generator.model, rows), lambda question, replies: texts.update({question.id: replies[0].text}),
    )  # fmt: skip
    return time.perf_counter() - start, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--images", type=Path, required=True, help="folder of .jpg files")
    parser.add_argument("--count", type=int, default=3, help="images")
    parser.add_argument("--questions", type=int, default=6, help="about each image")
    parser.add_argument("--tokens", type=int, default=8, help="new ones, at most")
    parser.add_argument("--rows", type=int, default=18, help="batch size")
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    model = LocalModel(ModelConfig(name=given.model), rows=given.rows)
    questions = questions_about(sorted(given.images.glob("*.jpg"))[: given.count], given.questions)
    plain = GenericGenerator(model.generator.model, model.processor, model.stops)
    found: dict[str, list[tuple[float, dict[Any, str]]]] = {}
    for _ in range(given.turns):  # in turns, so that a busy machine slows both
        for name, generator in (("shared image prompts", model.generator), ("generate", plain)):
            found.setdefault(name, []).append(timed(generator, model, questions, given.tokens, given.rows))
    for name, runs in found.items():
        best = min(seconds for seconds, _ in runs)
        print(f"{name:22} {best:7.2f} s  {len(questions) / best:6.2f} questions/s  (best of {len(runs)})")
    ours, theirs = (runs[0][1] for runs in found.values())
    print(f"same texts: {sum(ours[q.id] == theirs[q.id] for q in questions)} of {len(questions)}")
    facts = collect_facts()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {facts.get('cpu', '')}")


if __name__ == "__main__":
    main()
