"""MMBench: one right option among several, in every rotation of them; scored here, and handed to the official site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttrain.answering.questions import Question, check_image_files, with_suffix
from fasttrain.answering.records import llava_row, write_jsonl
from fasttrain.answering.run import Answer
from fasttrain.data.pairs import IMAGE
from fasttrain.errors import UserError
from fasttrain.evaluate.benchmarks import (
    AnswerFile,
    Benchmark,
    NoRightAnswers,
    ReadOptions,
    Scored,
    complaints,
    read_answer_rows,
)
from fasttrain.evaluate.mmbench_file import (
    MMBenchRow,
    read_rows,
    rows_by_question,
    submission_cells,
    with_rotations,
)
from fasttrain.evaluate.mmbench_score import ROTATION, circular_verdict, option_of
from fasttrain.evaluate.results import Result
from fasttrain.evaluate.spreadsheet import write_xlsx

SUFFIX = (
    "Answer with the option's letter from the given choices directly."  # as LLaVA-1.5's own evaluation asks
)
_ORIGIN = "https://opencompass.openxlab.space/utils/VLMEval/MMBench_DEV_EN.tsv"


def question_file(data: Path) -> Path:
    """The table in the data folder, the English development split of several; or questions.jsonl where there is none."""
    tables = sorted(data.glob("*.tsv")) if data.is_dir() else []
    if not tables and (data / "questions.jsonl").is_file():
        return data / "questions.jsonl"
    if not tables:
        what = "got none" if data.is_dir() else "got no such folder"
        raise UserError(f"--data {data}: wanted MMBench's table, {what}; download {_ORIGIN} and put it there")
    wanted = [path for path in tables if path.stem.lower() in ("mmbench_dev_en", "mmbench_dev_20230712")]
    if len(tables) > 1 and len(wanted) != 1:
        raise UserError(f"--data {data}: wanted one table, got {', '.join(path.name for path in tables)}")
    return (wanted or tables)[0]


def read(data: Path, options: ReadOptions) -> dict[str, list[Question]]:
    """A question per row and rotation: hint, question, options, and LLaVA's instruction unless told otherwise."""
    suffix = SUFFIX if options.suffix is None else options.suffix
    rows = read_rows(question_file(data))
    rows = with_rotations(rows) if options.circular else [row for row in rows if row.index < ROTATION]
    groups = list(rows_by_question(rows).values())[: options.limit]
    questions = [with_suffix(_question(row), suffix) for group in groups for row in group]
    check_image_files(questions)
    return {"": questions}


def _question(row: MMBenchRow) -> Question:
    assert row.image is not None
    lines = [
        *([row.hint] if row.hint else []),
        row.question,
        *(f"{key}. {text}" for key, text in row.options.items()),
    ]
    text = "\n".join(lines)
    return Question(
        id=row.index,
        where=row.where,
        messages=(("user", (IMAGE, ("text", text))),),
        images=(row.image,),
        row={"index": row.index, "base": row.base},
    )


def write(out: Path, answers: dict[str, list[Answer]], model_id: str, data: Path) -> list[Path]:
    """Answers in LLaVA's format, and the spreadsheet that the official site takes: the file's own rows, no more."""
    given = answers[""]
    path = write_jsonl(out / "mmbench_answers.jsonl", [llava_row(answer, model_id) for answer in given])
    texts = {answer.question.id: answer.turns[0] for answer in given}
    rows = [row for row in read_rows(question_file(data), images=False) if row.index in texts]
    cells = [submission_cells(row, texts[row.index]) for row in rows]
    columns = list(dict.fromkeys(name for row in cells for name in row if name != "prediction"))
    return [path, write_xlsx(out / "mmbench_submission.xlsx", [*columns, "prediction"], cells)]


def score(data: Path, answers: Mapping[str, AnswerFile], limit: int | None) -> Scored:
    """Share of questions right in every rotation that was asked; what needs a judge is counted and counts as not right."""
    given = next(iter(answers.values()))
    path = question_file(data)
    rows = read_rows(path, images=False)
    if any(row.answer is None for row in rows):
        raise NoRightAnswers(
            f"{path}: wanted an answer to every question, got a test split: the official site scores it"
        )
    if not given.has_ids:
        raise UserError("answers: wanted rows with question_id (the table's index), got none")
    turned = with_rotations(rows)
    known = {str(row.index) for row in turned}
    if not any(name in known for name in given.texts):
        raise UserError(f"answers: wanted answers to {path}, got none of its indices")
    if not any(int(name) >= ROTATION for name in given.texts if name in known):
        turned = [row for row in turned if row.index < ROTATION]  # answered without rotations
    groups = list(rows_by_question(turned).values())[:limit]
    unknown = [name for name in given.texts if name not in known]
    missing = [str(row.index) for group in groups for row in group if str(row.index) not in given.texts]
    whole = [group for group in groups if all(str(row.index) in given.texts for row in group)]
    if not whole:
        raise UserError(
            f"answers: wanted every rotation of a question, got that for none of {len(groups):,} of {path}"
        )
    return _score(whole, given, complaints("mmbench", given, missing, unknown), len(missing))


def _score(groups: list[list[MMBenchRow]], given: AnswerFile, warnings: list[str], missing: int) -> Scored:
    named = {
        row.index: option_of(given.texts[str(row.index)], row.options) for group in groups for row in group
    }
    verdicts = {
        group[0].base: circular_verdict(
            [named[row.index] for row in group], [row.answer or "" for row in group]
        )
        for group in groups
    }
    n, right = len(groups), Counter(verdicts.values())["right"]
    undecided = Counter(verdicts.values())["undecided"]
    chars = [len(given.texts[str(row.index)]) for group in groups for row in group]
    plain = sum(named[group[0].index] == group[0].answer for group in groups)
    scores: dict[str, Any] = {
        "benchmark": "mmbench",
        "model": given.model,
        "score": 100 * right / n,
        "accuracy": right / n,
        "accuracy_if_undecided_were_right": (right + undecided) / n,
        "accuracy_unrotated": plain / n,
        "n": n,
        "rotations": max(len(group) for group in groups),
        "undecided": undecided,
        "needs_judge": sum(option is None for option in named.values()),
        "answers": len(named),
        "mean_answer_chars": sum(chars) / len(chars),
    }
    for name, count in (("missing", missing), ("duplicates", given.duplicates)):
        if count:
            scores[name] = count
    scores["by_category"] = _by_category(groups, verdicts)
    return Scored(
        scores=scores,
        lines=_lines(scores),
        results=[_result(group, verdicts[group[0].base], given) for group in groups],
        warnings=warnings,
        missing=missing,
    )


def _by_category(groups: list[list[MMBenchRow]], verdicts: dict[int, Any]) -> dict[str, Any]:
    by_name: dict[str, list[bool]] = {}
    for group in groups:
        by_name.setdefault(group[0].category or "none", []).append(verdicts[group[0].base] == "right")
    return {
        name: {"accuracy": sum(right) / len(right), "n": len(right)}
        for name, right in sorted(by_name.items())
    }


def _lines(scores: dict[str, Any]) -> list[str]:
    rotations = (
        f"right in all of up to {scores['rotations']} rotations" if scores["rotations"] > 1 else "not rotated"
    )
    lines = [
        f"accuracy {scores['score']:.1f} %  ({rotations})  n {scores['n']:,}  "
        f"mean answer {scores['mean_answer_chars']:.0f} characters"
    ]
    if scores["needs_judge"]:
        upper = 100 * scores["accuracy_if_undecided_were_right"]
        lines.append(
            f"{scores['needs_judge']:,} of {scores['answers']:,} answers name no option and need a judge; "
            f"{scores['undecided']:,} questions hang on them: {upper:.1f} % if all were right"
        )
    return lines


def _result(group: list[MMBenchRow], verdict: str, given: AnswerFile) -> Result:
    chars = [len(given.texts[str(row.index)]) for row in group]
    return Result(
        id=str(group[0].base),
        question_id=group[0].base,
        category=group[0].category,
        score=float(verdict == "right"),
        answer_chars=round(sum(chars) / len(chars)),
        status="needs_judge" if verdict == "undecided" else "ok",
    )


BENCHMARK = Benchmark(
    name="mmbench", max_new_tokens=1024, read=read, write=write, read_answers=read_answer_rows, score=score
)
