"""POPE: is an object in the image? Questions per split, answers in LLaVA's format, scored here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttrain.answering.questions import Question, check_ids, check_image_files, question_of, with_suffix
from fasttrain.answering.records import llava_row, write_jsonl
from fasttrain.answering.run import Answer
from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.evaluate.benchmarks import (
    AnswerFile,
    Benchmark,
    ReadOptions,
    Scored,
    complaints,
    image_folder,
    read_answer_rows,
)
from fasttrain.evaluate.pope_score import pope_figures, says_yes
from fasttrain.evaluate.results import Result

SUFFIX = "Answer the question using a single word or phrase."  # LLaVA-1.5's own evaluation asks so
_FILE = re.compile(r"[a-z0-9]+_pope_(\w+)\.json")
_ORIGIN = "in github.com/AoiDragon/POPE, output/coco/coco_pope_{random,popular,adversarial}.json; put them into {data}"
_IMAGES = "COCO's: unpack images.cocodataset.org/zips/val2014.zip there"


def question_files(data: Path) -> dict[str, Path]:
    """Question files by split, in the order random, popular, adversarial, then others."""
    if not data.is_dir():
        raise UserError(
            f"--data: wanted a folder with POPE's question files, got {data}; they are {_origin(data)}"
        )
    order = {"random": 0, "popular": 1, "adversarial": 2}
    found: dict[str, Path] = {}
    for folder in (data, data / "coco", data / "output" / "coco"):
        for path in sorted(folder.glob("*_pope_*.json")):
            if (match := _FILE.fullmatch(path.name)) and found.setdefault(match[1], path) != path:
                raise UserError(
                    f"{data}: wanted one question file of split {match[1]}, got {found[match[1]]} and {path}"
                )
        if found:
            return dict(sorted(found.items(), key=lambda item: (order.get(item[0], 3), item[0])))
    raise UserError(
        f"{data}: wanted POPE's question files coco_pope_<split>.json, got none; they are {_origin(data)}"
    )


def _origin(data: Path) -> str:
    return _ORIGIN.replace("{data}", str(data))


def read_split(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of a question file, JSON lines or array; UserError for a row without id, text or label yes or no."""
    from fasttrain_data.errors import BadRow
    from fasttrain_data.jsonl import read_rows

    seen: dict[str, str] = {}
    rows = []
    with mistakes_of_data_tools():
        for place, row in read_rows(path):
            if row.get("label") not in ("yes", "no"):
                raise BadRow(path, place, "label", "yes or no", row.get("label"))
            for name in ("text", "image"):
                if not isinstance(row.get(name), str):
                    raise BadRow(path, place, name, "a string", row.get(name))
            key = row.get("question_id")
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise BadRow(path, place, "question_id", "a string or a whole number", key)
            if str(key) in seen:
                raise BadRow(
                    path, place, "question_id", f"an id of its own, {seen[str(key)]} has it too", str(key)
                )
            seen[str(key)] = place
            rows.append((place, row))
    if not rows:
        raise UserError(f"{path}: wanted at least one question, got none")
    return rows


def read(data: Path, options: ReadOptions) -> dict[str, list[Question]]:
    """Questions by split, with LLaVA's instruction under each unless told otherwise."""
    parts = {}
    suffix = SUFFIX if options.suffix is None else options.suffix
    for split, path in question_files(data).items():
        rows = read_split(path)[: options.limit]
        names = ("val2014", "images", ".", "../val2014")
        root = image_folder(data, options.images, names, rows[0][1]["image"], _IMAGES)
        questions = [
            with_suffix(question_of(row, f"{path} {place}", root, number), suffix)
            for number, (place, row) in enumerate(rows)
        ]
        check_ids(questions)
        check_image_files(questions)
        parts[split] = questions
    return parts


def write(out: Path, answers: dict[str, list[Answer]], model_id: str, data: Path) -> list[Path]:
    """A file per split: LLaVA's rows, which also hold what POPE's own scorer reads (`question`, `answer`)."""
    return [
        write_jsonl(
            out / f"{question_files(data)[split].stem}_answers.jsonl",
            [
                llava_row(answer, model_id)
                | {"question": answer.question.row["text"], "answer": answer.turns[0]}
                for answer in given
            ],
        )
        for split, given in answers.items()
    ]


def score(data: Path, answers: Mapping[str, AnswerFile], limit: int | None) -> Scored:
    """Each split that has answers, and the mean of their F1, the paper's figure."""
    files = question_files(data)
    scores: dict[str, Any] = {"benchmark": "pope", "model": next(iter(answers.values())).model}
    lines, results, warnings = [], [], []
    missing_in_all = 0
    for split, given in answers.items():
        every = [row for _, row in read_split(files[split])]
        rows = every[:limit]
        texts = _by_question(every, rows, given, files[split])
        known = {str(row["question_id"]) for row in every}
        missing = [name for row in rows if (name := str(row["question_id"])) not in texts]
        unknown = [name for name in texts if name not in known]
        if len(missing) == len(rows):
            which = "" if len(rows) == len(every) else "first "
            raise UserError(
                f"{split}: wanted answers to {files[split]}, got none of its {which}{len(rows)} question ids"
            )
        kept = [row for row in rows if str(row["question_id"]) in texts]
        said = [says_yes(texts[str(row["question_id"])]) for row in kept]
        figures = pope_figures([row["label"] == "yes" for row in kept], said)
        chars = [len(texts[str(row["question_id"])]) for row in kept]
        scores[split] = {**figures, "mean_answer_chars": sum(chars) / len(chars)}
        for name, count in (
            ("missing", len(missing)),
            ("unknown", len(unknown)),
            ("duplicates", given.duplicates),
        ):
            if count:
                scores[split][name] = count
        warnings += complaints(split, given, missing, unknown)
        if empty := sum(not texts[str(row["question_id"])].strip() for row in kept):
            warnings.append(f"{split}: {empty:,} answers are empty, which the official rule reads as yes")
        missing_in_all += len(missing)
        lines.append(_line(split, scores[split]))
        results += [_result(split, row, yes, length) for row, yes, length in zip(kept, said, chars)]
    scores["mean_f1"] = sum(scores[split]["f1"] for split in answers) / len(answers)
    splits = f"{len(answers)} splits" if len(answers) > 1 else "1 split"
    lines.append(f"mean F1 of {splits}: {scores['mean_f1']:.4f}")
    return Scored(scores=scores, lines=lines, results=results, warnings=warnings, missing=missing_in_all)


def _by_question(
    every: list[dict[str, Any]], rows: list[dict[str, Any]], given: AnswerFile, path: Path
) -> dict[str, str]:
    """Texts by question id; a file without ids (POPE's own format) must answer every question, or all of `rows`, in order."""
    if given.has_ids:
        return given.texts
    if len(given.texts) == len(every):
        rows = every
    if len(given.texts) != len(rows):
        raise UserError(
            f"answers without question_id: wanted one for each of the {len(rows)} questions of {path}, got {len(given.texts)}"
        )
    for row, prompt in zip(rows, given.prompts, strict=True):
        if prompt is not None and prompt.strip().lower() != row["text"].strip().lower():
            raise UserError(
                f"answers without question_id: wanted the order of {path}, got an answer to {prompt!r} for {row['text']!r}"
            )
    return {str(row["question_id"]): text for row, text in zip(rows, given.texts.values(), strict=True)}


def _line(split: str, figures: dict[str, Any]) -> str:
    shown = "  ".join(
        f"{name} {figures[name]:.4f}" for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")
    )
    return (
        f"{split:12} {shown}  n {figures['n']:,}  mean answer {figures['mean_answer_chars']:.0f} characters"
    )


def _result(split: str, row: dict[str, Any], yes: bool, chars: int) -> Result:
    from fasttrain_data.ids import content_hash

    said = "yes" if yes else "no"
    return Result(
        id=f"{split}-{row['question_id']}",
        question_id=row["question_id"],
        category=None,
        score=float(said == row["label"]),
        answer_chars=chars,
        extra={
            "split": split,
            "label": row["label"],
            "prediction": said,
            # half of a split's questions stand in the others too
            "asked": content_hash("pope", row["image"], row["text"])[:16],
        },
    )


BENCHMARK = Benchmark(
    name="pope",
    max_new_tokens=128,
    read=read,
    write=write,
    read_answers=read_answer_rows,
    score=score,
    parts=lambda data: list(question_files(data)),
)
