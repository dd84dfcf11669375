"""MT-Bench: 80 questions of two turns, in FastChat's formats and folder layout. A judge scores it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fasttrain.answering.questions import Question, read_questions
from fasttrain.answering.records import fastchat_row, write_jsonl
from fasttrain.answering.run import Answer
from fasttrain.data.bad_row import BadRow
from fasttrain.evaluate.benchmarks import AnswerFile, Benchmark, ReadOptions, find_data_file
from fasttrain.evaluate.judging.outcome import file_name

_ORIGIN = "fastchat/llm_judge/data/mt_bench/question.jsonl of github.com/lm-sys/FastChat"
# FastChat's sampling temperature by category; it answers the others, and the newer ones, greedily
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


def read(data: Path, options: ReadOptions) -> dict[str, list[Question]]:
    """The questions; with FastChat's temperatures where those are asked for."""
    path = find_data_file(
        data, ("question.jsonl", "mt_bench/question.jsonl", "*question.jsonl"), "the questions", _ORIGIN
    )
    questions = read_questions(path, limit=options.limit)
    for question in questions:
        if "turns" not in question.row or not isinstance(question.row.get("category"), str):
            raise BadRow(
                question.where, "turns", "MT-Bench's question_id, category and turns", ", ".join(question.row)
            )
    if options.category_temperatures:
        questions = [replace(q, temperature=TEMPERATURES.get(q.row["category"], 0.0)) for q in questions]
    return {"": questions}


def write(out: Path, answers: dict[str, list[Answer]], model_id: str, data: Path) -> list[Path]:
    """`model_answer/MODEL.jsonl`, where FastChat looks for it when the output folder is its data/mt_bench."""
    path = out / "model_answer" / f"{file_name(model_id)}.jsonl"
    return [write_jsonl(path, [fastchat_row(answer, model_id) for answer in answers[""]])]


def read_answers(path: Path) -> AnswerFile:
    """Both turns of each answer, joined: for lengths only."""
    from fasttrain.errors import mistakes_of_data_tools
    from fasttrain.evaluate.judging.mt_bench import read_answers as read_turns

    with mistakes_of_data_tools():
        given = read_turns(path)
    texts = {str(name): "".join(turns) for name, turns in given.turns.items()}
    return AnswerFile(texts=texts, model=given.model, duplicates=given.duplicates)


BENCHMARK = Benchmark(name="mt-bench", max_new_tokens=1024, read=read, write=write, read_answers=read_answers)
