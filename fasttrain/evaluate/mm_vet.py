"""MM-Vet: 218 open questions about images, answers as one JSON object. A judge scores it."""

from __future__ import annotations

import json
from pathlib import Path

from fasttrain.answering.questions import Question, check_image_files, question_of, with_suffix
from fasttrain.answering.run import Answer
from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.evaluate.benchmarks import AnswerFile, Benchmark, ReadOptions, find_data_file, image_folder
from fasttrain.evaluate.judging.outcome import file_name
from fasttrain.files import write_atomic

_ORIGIN = "in mm-vet.zip of github.com/yuweihao/MM-Vet (releases); unpack it there"


def read(data: Path, options: ReadOptions) -> dict[str, list[Question]]:
    """The questions in file order, each with its image."""
    from fasttrain.evaluate.judging.inputs import read_object

    path = find_data_file(data, ("mm-vet.json", "mm-vet/mm-vet.json"), "the questions", _ORIGIN)
    with mistakes_of_data_tools():
        rows = list(read_object(path).items())[: options.limit]
    for name, row in rows:
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("imagename", "question")
        ):
            raise UserError(f"{path}: {name}: wanted imagename and question, got {str(row)[:80]}")
    if not rows:
        raise UserError(f"{path}: wanted at least one question, got none")
    root = image_folder(path.parent, options.images, ("images", "."), rows[0][1]["imagename"], _ORIGIN)
    questions = []
    for number, (name, row) in enumerate(rows):
        asked = {"question_id": name, "text": row["question"], "image": row["imagename"]}
        question = question_of(asked, f"{path}: {name}", root, number)
        questions.append(with_suffix(question, options.suffix or ""))
    check_image_files(questions)
    return {"": questions}


def write(out: Path, answers: dict[str, list[Answer]], model_id: str, data: Path) -> list[Path]:
    """`MODEL.json`: the official {"v1_0": text, ...}."""
    path = out / f"{file_name(model_id)}.json"
    out.mkdir(parents=True, exist_ok=True)
    texts = {str(answer.question.id): answer.turns[0] for answer in answers[""]}
    write_atomic(path, json.dumps(texts, indent=4, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return [path]


def read_answers(path: Path) -> AnswerFile:
    from fasttrain.evaluate.judging.inputs import read_object

    with mistakes_of_data_tools():
        given = read_object(path)
    for name, text in given.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: {name}: wanted the answer's text, got {str(text)[:60]!r}")
    return AnswerFile(texts=given, model=path.stem)


BENCHMARK = Benchmark(name="mm-vet", max_new_tokens=1024, read=read, write=write, read_answers=read_answers)
