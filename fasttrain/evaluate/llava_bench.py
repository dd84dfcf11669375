"""LLaVA-Bench in the wild (and the COCO set): answers in LLaVA's format. A judge scores it."""

from __future__ import annotations

from pathlib import Path

from fasttrain.answering.questions import Question, read_questions, with_suffix
from fasttrain.answering.records import llava_row, write_jsonl
from fasttrain.answering.run import Answer
from fasttrain.errors import mistakes_of_data_tools
from fasttrain.evaluate.benchmarks import (
    Benchmark,
    ReadOptions,
    find_data_file,
    image_folder,
    read_answer_rows,
)
from fasttrain.evaluate.judging.outcome import file_name

_ORIGIN = "in huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_COCO = "COCO's (images.cocodataset.org/zips/val2014.zip), named without COCO_val2014_"


def read(data: Path, options: ReadOptions) -> dict[str, list[Question]]:
    """The questions in file order, each with its image."""
    from fasttrain_data.jsonl import read_rows

    path = find_data_file(data, ("questions.jsonl", "qa90_questions.jsonl"), "the questions", _ORIGIN)
    with mistakes_of_data_tools():
        first = next(iter(read_rows(path)), ("", {}))[1].get("image", "")
    origin = _COCO if path.name.startswith("qa90") else _ORIGIN
    root = image_folder(path.parent, options.images, ("images", "val2014", "."), str(first), origin)
    questions = read_questions(path, root, options.limit)
    return {"": [with_suffix(question, options.suffix or "") for question in questions]}


def write(out: Path, answers: dict[str, list[Answer]], model_id: str, data: Path) -> list[Path]:
    """`MODEL.jsonl`, with each question's category."""
    rows = [
        llava_row(answer, model_id) | {"category": answer.question.row.get("category")}
        for answer in answers[""]
    ]
    return [write_jsonl(out / f"{file_name(model_id)}.jsonl", rows)]


BENCHMARK = Benchmark(
    name="llava-bench", max_new_tokens=1024, read=read, write=write, read_answers=read_answer_rows
)
