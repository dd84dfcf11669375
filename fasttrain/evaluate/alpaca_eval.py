"""AlpacaEval: 805 instructions, answers as `alpaca_eval` takes them. A judge scores it."""

from __future__ import annotations

import json
from pathlib import Path

from fasttrain.answering.questions import Question, with_suffix
from fasttrain.answering.run import Answer
from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.evaluate.benchmarks import AnswerFile, Benchmark, ReadOptions, find_data_file
from fasttrain.files import write_atomic

_ORIGIN = "huggingface.co/datasets/tatsu-lab/alpaca_eval, file alpaca_eval.json"
_NAMES = (
    "alpaca_eval.json",
    "alpaca_eval_gpt4_baseline.json",
    "text_davinci_003_outputs.json",
    "text_davinci_003.json",
    "reference_outputs.json",
    "text_davinci_003/model_outputs.json",
)


def read(data: Path, options: ReadOptions) -> dict[str, list[Question]]:
    """The instructions, numbered in file order: the file has no ids."""
    from fasttrain_data.errors import BadRow
    from fasttrain_data.jsonl import read_rows

    path = find_data_file(data, _NAMES, "the instructions", _ORIGIN)
    questions = []
    with mistakes_of_data_tools():
        for number, (place, row) in enumerate(read_rows(path)):
            text = row.get("instruction")
            if not isinstance(text, str) or not text.strip():
                raise BadRow(path, place, "instruction", "text", text)
            question = Question(
                id=number, where=f"{path} {place}", messages=(("user", (("text", text),)),), row=row
            )
            questions.append(with_suffix(question, options.suffix or ""))
    if not questions:
        raise UserError(f"{path}: wanted at least one instruction, got none")
    return {"": questions[: options.limit]}


def write(out: Path, answers: dict[str, list[Answer]], model_id: str, data: Path) -> list[Path]:
    """`model_outputs.json`: instruction, output, generator and the instruction's data set."""
    rows = []
    for answer in answers[""]:
        row = {
            "instruction": answer.question.row["instruction"],
            "output": answer.turns[0],
            "generator": model_id,
        }
        rows.append(
            row | {key: answer.question.row[key] for key in ("dataset",) if key in answer.question.row}
        )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model_outputs.json"
    write_atomic(path, json.dumps(rows, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return [path]


def read_answers(path: Path) -> AnswerFile:
    from fasttrain_data.errors import BadRow
    from fasttrain_data.jsonl import read_rows

    texts, model = {}, ""
    with mistakes_of_data_tools():
        for place, row in read_rows(path):
            if not isinstance(row.get("output"), str):
                raise BadRow(path, place, "output", "text", row.get("output"))
            texts[str(row.get("instruction"))] = row["output"]
            model = model or str(row.get("generator") or "")
    return AnswerFile(texts=texts, model=model or path.stem)


BENCHMARK = Benchmark(
    name="alpaca-eval", max_new_tokens=2048, read=read, write=write, read_answers=read_answers
)
