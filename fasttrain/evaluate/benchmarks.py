"""The six benchmarks behind one form: how their questions are read, their answers written, and, where it is exact, scored."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.answering.questions import Question
from fasttrain.answering.run import Answer
from fasttrain.errors import UserError, mistakes_of_data_tools

NAMES = ("mt-bench", "mm-vet", "llava-bench", "pope", "mmbench", "alpaca-eval")


class NoRightAnswers(UserError):
    """The benchmark's file is a test split, whose right answers only the official site has."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """images: folder of the images, None for the benchmark's usual places. suffix: put under each question, None for
    the benchmark's own. limit: the first questions of each part only. circular: MMBench's rotations.
    category_temperatures: FastChat's, for MT-Bench."""

    images: Path | None = None
    suffix: str | None = None
    limit: int | None = None
    circular: bool = True
    category_temperatures: bool = False


@dataclass(frozen=True, kw_only=True)
class Scored:
    """scores: what scores.json holds. lines: the same for a person. warnings: what a reader of the scores must know.

    missing: questions without an answer. results: a row per scored answer, as `fasttrain compare` reads them.
    """

    scores: dict[str, Any]
    lines: list[str]
    results: list[Any]
    warnings: list[str] = field(default_factory=list)
    missing: int = 0


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark's parts are its question files: POPE has one per split, the others one, called "".

    read: questions by part; UserError that says what to download when they are absent. write: the answers of all parts in
    the official format, first the file per part that `--answers` and judges take, then whatever else is handed on.
    score: exact, from the data folder and texts by part and id; None for a benchmark that a judge scores.
    """

    name: str
    max_new_tokens: int
    read: Callable[[Path, ReadOptions], dict[str, list[Question]]]
    write: Callable[[Path, dict[str, list[Answer]], str, Path], list[Path]]
    read_answers: Callable[[Path], AnswerFile]
    score: Callable[[Path, Mapping[str, AnswerFile], int | None], Scored] | None = None
    parts: Callable[[Path], Sequence[str]] = lambda data: ("",)


@dataclass(frozen=True, kw_only=True)
class AnswerFile:
    """Texts by question id (as text; in file order, for files without ids), the model they are signed with, repeats."""

    texts: dict[str, str]
    model: str
    has_ids: bool = True
    duplicates: int = 0
    differing: int = 0
    prompts: list[str | None] = field(default_factory=list)


def find_benchmark(name: str) -> Benchmark:
    found: Benchmark = importlib.import_module(f"fasttrain.evaluate.{name.replace('-', '_')}").BENCHMARK
    return found


def benchmark_of(folder: Path) -> str | None:
    """Which of the benchmarks that are scored here a folder holds the questions of; None for any other path."""
    if not folder.is_dir():
        return None
    if any(any(folder.glob(f"{below}*_pope_*.json")) for below in ("", "coco/", "output/coco/")):
        return "pope"
    return "mmbench" if any(folder.glob("*.tsv")) else None


def find_data_file(data: Path, names: Sequence[str], what: str, origin: str) -> Path:
    """The first of `names` (patterns) in the data folder; UserError says what to download and where to put it."""
    from fasttrain.evaluate.judging.inputs import find_file

    with mistakes_of_data_tools():
        return find_file(data, names, what, origin)


def image_folder(data: Path, given: Path | None, names: Sequence[str], example: str, origin: str) -> Path:
    """Where the images are: as given, or the first of `names` under `data` that holds `example`."""
    places = [given] if given is not None else [data / name for name in names]
    for place in places:
        if (place / example).is_file():
            return place
    where = f"--images {given}" if given is not None else f"{data / names[0]} (or give --images)"
    raise UserError(
        f"{where}: wanted the benchmark's images, {example} first, got no such file; they are {origin}"
    )


def read_answer_rows(path: Path) -> AnswerFile:
    """Answers as JSON lines or an array: LLaVA's (`text`), FastChat's (`choices`), POPE's own (`answer`).

    Of several rows with one id the last counts, as in FastChat's reader; how many there were is kept.
    """
    from fasttrain_data.errors import BadRow
    from fasttrain_data.jsonl import read_rows

    texts: dict[str, str] = {}
    prompts: list[str | None] = []
    duplicates = differing = rows = 0
    model = ""
    with mistakes_of_data_tools():
        for place, row in read_rows(path):
            text = row.get("text", row.get("answer"))
            if not isinstance(text, str):
                raise BadRow(path, place, "text", "the answer's text", text)
            name = row.get("question_id", row.get("index"))
            if isinstance(name, bool) or not isinstance(name, (str, int, type(None))):
                raise BadRow(path, place, "question_id", "a string or a whole number", name)
            if rows and (name is None) != bool(prompts):
                raise BadRow(path, place, "question_id", "an id in every row or in none", name)
            if name is None:
                prompts.append(row["question"] if isinstance(row.get("question"), str) else None)
            key = str(rows if name is None else name)
            duplicates += key in texts
            differing += texts.get(key, text) != text
            texts[key] = text
            rows += 1
            model = model or str(row.get("model_id") or "")
        if not rows:
            raise UserError(f"{path}: wanted at least one answer, got none")
    return AnswerFile(
        texts=texts,
        model=model or path.stem,
        has_ids=not prompts,
        duplicates=duplicates,
        differing=differing,
        prompts=prompts,
    )


def complaints(name: str, file: AnswerFile, missing: Sequence[str], unknown: Sequence[str]) -> list[str]:
    """What is wrong with an answer file, each in one line."""
    lines = []
    if missing:
        lines.append(
            f"{name}: {len(missing):,} questions have no answer and are not in the score, first {missing[0]}"
        )
    if unknown:
        lines.append(f"{name}: {len(unknown):,} answers belong to no question, first {unknown[0]}")
    if file.duplicates:
        differ = f", {file.differing:,} of them with another text" if file.differing else ""
        lines.append(
            f"{name}: {file.duplicates:,} answers are repeats{differ}; the last one of a question counts"
        )
    return lines
