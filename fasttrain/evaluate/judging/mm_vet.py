"""MM-Vet: a few-shot judge marks each answer 0.0 to 1.0; bad replies are asked again, warmer, and count 0 in the end."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasttrain.evaluate.judging import outcome
from fasttrain.evaluate.judging.calls import JudgeCalls, Judgment
from fasttrain.evaluate.judging.inputs import Gaps, find_file, insert, read_object
from fasttrain.evaluate.judging.options import JudgeOptions
from fasttrain.evaluate.judging.parsing import correctness_of
from fasttrain.evaluate.judging.request import JudgeRequest
from fasttrain.evaluate.results import Result, write_results
from fasttrain_data.errors import UserError
from fasttrain_data.ids import content_hash
from fasttrain_data.jsonl import write_text

TRIES, WARMER, HOTTEST = 5, 0.5, 2.0
OUTPUT_TOKENS = 3
PROMPT_NAMES = ("judge_prompt.txt", "mm-vet-prompt.txt")
_AGAIN = "\nThe mark alone, as a number from 0.0 to 1.0: "
_ORIGIN = "in mm-vet.zip of github.com/yuweihao/MM-Vet"


@dataclass(kw_only=True)
class Item:
    """One question, and what came of it so far. tries: replies that were read, the last one good or not."""

    id: str
    question: str
    expected: str
    capabilities: tuple[str, ...]
    prediction: str
    tries: int = 0
    mark: float | None = None
    last: Judgment | None = field(default=None, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether the last reply could not be read and another try is left."""
        replied = self.last is None or self.last.replied
        return self.mark is None and replied and self.tries < TRIES


class MMVet:
    """All questions of the benchmark that one model answered."""

    def __init__(self, data: Path, answers: Path, options: JudgeOptions) -> None:
        self.options = options
        self.model = answers.stem
        self.prompt = _read_prompt(data, options)
        self.gaps = Gaps()
        self.items = _read_items(data, answers, options, self.gaps)

    def requests(self) -> list[JudgeRequest]:
        """The first try of each question."""
        return [self._request(item, 0) for item in self.items]

    def score(self, calls: JudgeCalls, out: Path) -> dict[str, Any]:
        for number in range(TRIES):
            open_items = [item for item in self.items if item.is_open]
            judgments = calls.ask([self._request(item, number) for item in open_items])
            for item, judgment in zip(open_items, judgments, strict=True):
                item.last = judgment
                if judgment.replied:
                    item.tries += 1
                    item.mark = correctness_of(judgment.text or "")
        results = [_result(item) for item in self.items]
        self._write_official(out, results)
        write_results(out, results)
        return self._scores(results)

    def _request(self, item: Item, number: int) -> JudgeRequest:
        values = {"question": item.question, "answer": item.expected, "prediction": item.prediction}
        return JudgeRequest(
            model=self.options.model,
            server=self.options.server,
            system=None,
            prompt=insert(self.prompt, values) + (_AGAIN if number else ""),
            temperature=min(HOTTEST, self.options.heat(0.0) + WARMER * number),
            max_output_tokens=self.options.tokens(OUTPUT_TOKENS),
            about=item.id,
            likely_tokens=3,
            sample=number,
        )

    def _write_official(self, out: Path, results: list[Result]) -> None:
        """MM-Vet's grade file and its two score tables; questions without a mark are left for another run."""
        grades = {
            item.id: {
                "model": [(item.last and item.last.model_version) or self.options.model],
                "content": [item.last.text if item.last and item.last.text else ""],
                "score": [result.score],
            }
            for item, result in zip(self.items, results, strict=True)
            if result.score is not None
        }
        name, judge = outcome.file_name(self.model), outcome.file_name(self.options.model)
        write_text(out / f"{name}_{judge}-grade-1runs.json", json.dumps(grades, indent=4) + "\n")
        for kind, groups in (("cap", _by_capability(results)), ("cap-int", _by_combination(results))):
            path = out / f"{name}_{judge}-{kind}-score-1runs.csv"
            write_text(path, _table(self.model, groups, results))

    def _scores(self, results: list[Result]) -> dict[str, Any]:
        total = outcome.mean_score(results, 100)
        scores = outcome.shared_scores("mm-vet", self.model, total, results)
        return scores | {
            "judge_prompt": content_hash(self.prompt),
            "judge_temperature": self.options.heat(0.0),
            "capabilities": {name: _of(group) for name, group in _by_capability(results).items()},
            "combinations": {name: _of(group) for name, group in _by_combination(results).items()},
            "asked_again": sum(item.tries > 1 for item in self.items),
            "zero_after_bad_replies": sum(item.mark is None and item.tries == TRIES for item in self.items),
        }


def _result(item: Item) -> Result:
    """Five bad replies count 0, as in the original; a question the judge gave no reply to is excluded."""
    score, status = item.mark, "ok"
    if score is None and item.tries == TRIES:
        score, status = 0.0, "ok"
    elif score is None:
        status = item.last.status if item.last else "quota"
    return Result(
        id=item.id,
        question_id=item.id,
        category="_".join(item.capabilities),
        score=score,
        answer_chars=len(item.prediction),
        status=status,
        extra={"capabilities": list(item.capabilities), "tries": item.tries},
    )


def _by_capability(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by capability, the most frequent first."""
    counts = Counter(name for result in results for name in result.extra["capabilities"])
    return {
        name: [result for result in results if name in result.extra["capabilities"]]
        for name, _ in counts.most_common()
    }


def _by_combination(results: Sequence[Result]) -> dict[str, list[Result]]:
    counts = Counter(result.category for result in results)
    return {
        str(name): [result for result in results if result.category == name]
        for name, _ in counts.most_common()
    }


def _of(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "score": outcome.mean_score(results, 100),
        "n": sum(result.score is not None for result in results),
        "mean_answer_chars": outcome.mean_chars(results),
    }


def _table(model: str, groups: dict[str, list[Result]], results: Sequence[Result]) -> str:
    """The original's CSV: a row per model, its groups, total, spread over runs, and the runs."""
    values = [outcome.mean_score(group, 100) for group in [*groups.values(), results]]
    shown = ["" if value is None else round(value, 1) for value in values]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["", *groups, "total", "std", "runs"])
    writer.writerow([model, *shown, 0.0, f"[{shown[-1]}]"])
    return buffer.getvalue()


def _read_prompt(data: Path, options: JudgeOptions) -> str:
    """--judge-prompt, else the one in --data, else ours; with our placeholders, or ending where the case goes."""
    places = [options.prompt] if options.prompt else [data / name for name in PROMPT_NAMES]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return (
            (files("fasttrain.evaluate.judging") / "assets" / "mm_vet.txt")
            .read_text(encoding="utf-8")
            .rstrip()
        )
    text = path.read_text(encoding="utf-8").rstrip("\n")
    names = ("{question}", "{answer}", "{prediction}")
    there = [name for name in names if name in text]
    if there and len(there) < len(names):
        raise UserError(
            f"{path}: wanted a prompt with {', '.join(names)}, or with none of them, got {', '.join(there)}"
        )
    return text if there else text + "\n" + " | ".join(names) + " | "


def _read_items(data: Path, answers: Path, options: JudgeOptions, gaps: Gaps) -> list[Item]:
    path = find_file(data, ("mm-vet.json", "mm-vet/mm-vet.json"), "the questions", _ORIGIN)
    questions, given = read_object(path), read_object(answers)
    items = []
    for name in gaps.answered(questions, given, answers, options):
        row = questions[name]
        if not isinstance(row, dict) or not isinstance(row.get("capability"), list):
            raise UserError(f"{path}: {name}: wanted question, answer and capability, got {str(row)[:60]!r}")
        for key in ("question", "answer"):
            if not isinstance(row.get(key), str):
                raise UserError(f"{path}: {name}: {key}: wanted a string, got {row.get(key)!r}")
        if not isinstance(given[name], str):
            raise UserError(f"{answers}: {name}: wanted the answer's text, got {str(given[name])[:60]!r}")
        items.append(
            Item(
                id=name,
                question=row["question"],
                expected=row["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> "),
                capabilities=tuple(sorted(map(str, set(row["capability"])))),
                prediction=given[name],
            )
        )
    return items
