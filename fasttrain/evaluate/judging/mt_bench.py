"""MT-Bench: FastChat's single-answer grading, turn by turn, with its judge prompts read from --data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.evaluate.judging import outcome
from fasttrain.evaluate.judging.calls import JudgeCalls, Judgment
from fasttrain.evaluate.judging.inputs import Gaps, by_id, fill, find_file, model_name, text_of, texts_of
from fasttrain.evaluate.judging.options import JudgeOptions
from fasttrain.evaluate.judging.parsing import rating_of
from fasttrain.evaluate.judging.request import JudgeRequest
from fasttrain.evaluate.results import Result, write_results
from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.ids import content_hash
from fasttrain_data.jsonl import dump_row, read_rows, write_text

NEED_REFERENCE = frozenset({"math", "reasoning", "coding"})
API_ERROR = "$ERROR$"  # what FastChat writes for a call that failed
OUTPUT_TOKENS = 2048
_ORIGIN = "part of github.com/lm-sys/FastChat, folder fastchat/llm_judge/data"


@dataclass(frozen=True, kw_only=True)
class Template:
    """One line of judge_prompts.jsonl."""

    name: str
    system: str
    prompt: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer to judge: question and answer up to this turn. references: None outside math, reasoning, coding."""

    question_id: str | int
    category: str
    number: int
    questions: tuple[str, ...]
    references: tuple[str, ...] | None

    @property
    def id(self) -> str:
        return f"{self.question_id}/{self.number}"

    def template_name(self, plain: str, math: str) -> str:
        base = plain if self.references is None else math
        return base if self.number == 1 else f"{base}-multi-turn"

    def reference_values(self) -> dict[str, str]:
        texts = self.references or ()
        return {f"ref_answer_{number}": text for number, text in enumerate(texts, start=1)}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """An answer file: the turns of each question's first choice."""

    model: str
    turns: dict[str | int, tuple[str, ...]]
    duplicates: int
    path: Path


class MTBench:
    """All turns of the benchmark that one model answered."""

    def __init__(self, data: Path, answers: Path, options: JudgeOptions) -> None:
        self.options = options
        self.templates = read_templates(data)
        self.answers = read_answers(answers)
        self.gaps = Gaps()
        self.turns = list(read_turns(data, self.answers, options, self.gaps))

    def requests(self) -> list[JudgeRequest]:
        return [self._request(turn) for turn in self.turns]

    def score(self, calls: JudgeCalls, out: Path) -> dict[str, Any]:
        requests = self.requests()
        judged = list(zip(self.turns, requests, calls.ask(requests), strict=True))
        results = [self._result(turn, judgment) for turn, _, judgment in judged]
        rows = [self._official(*item) for item in judged]
        name = outcome.file_name(self.options.model)
        write_text(
            out / "model_judgment" / f"{name}_single.jsonl", "".join(dump_row(row) + "\n" for row in rows)
        )
        write_results(out, results)
        return self._scores(results)

    def _request(self, turn: Turn) -> JudgeRequest:
        template = self.templates[turn.template_name("single-v1", "single-math-v1")]
        answer = self.answers.turns[turn.question_id]
        values = turn.reference_values()
        if turn.number == 1:
            values |= {"question": turn.questions[0], "answer": answer[0]}
        else:
            values |= {f"question_{n}": text for n, text in enumerate(turn.questions, start=1)}
            values |= {f"answer_{n}": text for n, text in enumerate(answer, start=1)}
        return judge_request(self.options, template, values, turn.id)

    def _result(self, turn: Turn, judgment: Judgment) -> Result:
        rating = rating_of(judgment.text) if judgment.text is not None else None
        status = judgment.status if judgment.text is None or rating is not None else outcome.PARSE_FAILED
        return Result(
            id=turn.id,
            question_id=turn.question_id,
            category=turn.category,
            score=rating,
            answer_chars=len(self.answers.turns[turn.question_id][turn.number - 1]),
            status=status,
            extra={"turn": turn.number},
        )

    def _official(self, turn: Turn, request: JudgeRequest, judgment: Judgment) -> dict[str, Any]:
        """A line of FastChat's model_judgment file; -1 is what its tools drop."""
        text = API_ERROR if judgment.text is None else judgment.text
        rating = rating_of(text)
        return {
            "question_id": turn.question_id,
            "model": self.answers.model,
            "judge": [self.options.model, turn.template_name("single-v1", "single-math-v1")],
            "user_prompt": request.prompt,
            "judgment": text,
            "score": -1 if rating is None else int(rating) if rating.is_integer() else rating,
            "turn": turn.number,
            "tstamp": time.time(),
        }

    def _scores(self, results: list[Result]) -> dict[str, Any]:
        first = [result for result in results if result.extra["turn"] == 1]
        second = [result for result in results if result.extra["turn"] == 2]
        categories = dict.fromkeys(result.category for result in results)
        scores = outcome.shared_scores("mt-bench", self.answers.model, outcome.mean_score(results), results)
        kept = [-1.0 if result.score is None else result.score for result in results]
        return scores | {
            "judge_prompt": prompts_hash(self.templates),
            "judge_temperature": self.options.heat(0.0),
            "turn_1": outcome.mean_score(first),
            "turn_2": outcome.mean_score(second),
            "categories": {
                name: _of([result for result in results if result.category == name]) for name in categories
            },
            "if_failures_were_kept_as_-1": outcome.mean(kept),
            "outside_1_to_10": sum(not 1 <= r.score <= 10 for r in results if r.score is not None),
            "duplicate_answers": self.answers.duplicates,
        }


def _of(results: list[Result]) -> dict[str, Any]:
    return {
        "score": outcome.mean_score(results),
        "n": sum(result.score is not None for result in results),
        "mean_answer_chars": outcome.mean_chars(results),
    }


def judge_request(
    options: JudgeOptions, template: Template, values: dict[str, str], about: str
) -> JudgeRequest:
    """A request with a template of judge_prompts.jsonl filled in; temperature 0 and 2048 tokens, as FastChat asks."""
    return JudgeRequest(
        model=options.model,
        server=options.server,
        system=template.system,
        prompt=fill(template.prompt, values, template.path),
        temperature=options.heat(0.0),
        max_output_tokens=options.tokens(OUTPUT_TOKENS),
        about=about,
    )


def read_templates(data: Path) -> dict[str, Template]:
    """The judge prompts by name."""
    path = find_file(data, ("judge_prompts.jsonl", "../judge_prompts.jsonl"), "the judge prompts", _ORIGIN)
    templates = {}
    for place, row in read_rows(path):
        name = text_of(path, place, row, "name")
        system, prompt = (
            text_of(path, place, row, "system_prompt"),
            text_of(path, place, row, "prompt_template"),
        )
        templates[name] = Template(name=name, system=system, prompt=prompt, path=path)
    wanted = [f"{base}{end}" for base in ("single-v1", "single-math-v1") for end in ("", "-multi-turn")]
    if missing := [name for name in wanted if name not in templates]:
        raise UserError(f"{path}: wanted the prompt {missing[0]!r}, got {', '.join(sorted(templates))}")
    return templates


def prompts_hash(templates: dict[str, Template]) -> str:
    """Equal where the judge is told the same."""
    return content_hash({name: [template.system, template.prompt] for name, template in templates.items()})


def read_answers(path: Path) -> Answers:
    """FastChat's answer file: choices[0].turns of each question."""
    rows, duplicates = by_id(path)
    turns = {}
    for name, (place, row) in rows.items():
        choices = row.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise BadRow(path, place, "choices", 'a list with {"index": 0, "turns": [...]}', choices)
        turns[name] = tuple(texts_of(path, place, choices[0], "turns"))
    model = model_name(path, (row for _, row in rows.values()), "model_id")
    return Answers(model=model, turns=turns, duplicates=duplicates, path=path)


def read_turns(data: Path, answers: Answers, options: JudgeOptions, gaps: Gaps) -> Iterator[Turn]:
    """Every turn to judge, questions in file order."""
    path = find_file(
        data, ("question.jsonl", "mt_bench/question.jsonl", "*question.jsonl"), "the questions", _ORIGIN
    )
    questions, _ = by_id(path)
    references = _References(data, options.model)
    for name in gaps.answered(questions, answers.turns, answers.path, options):
        place, row = questions[name]
        asked = tuple(texts_of(path, place, row, "turns"))
        category = text_of(path, place, row, "category")
        given = answers.turns[name]
        if len(given) < len(asked):
            raise UserError(
                f"{answers.path}: question {name}: wanted answers to {len(asked)} turns, got {len(given)}"
            )
        reference = references.of(name) if category in NEED_REFERENCE else None
        for number in range(1, min(len(asked), 2) + 1):  # FastChat's prompts know two turns
            yield Turn(
                question_id=name,
                category=category,
                number=number,
                questions=asked,
                references=reference,
            )


class _References:
    """Reference answers: the judge's own file where there is one, else GPT-4's."""

    def __init__(self, data: Path, judge: str) -> None:
        names = [
            f"{folder}reference_answer{sep}{model}.jsonl"
            for model in (judge.replace("/", "_"), "gpt-4")
            for folder, sep in (("", "/"), ("mt_bench/", "/"), ("*", "__"))
        ]
        self._data, self._names = data, names
        self._answers: Answers | None = None

    def of(self, name: str | int) -> tuple[str, ...]:
        if self._answers is None:
            plain = ["reference_answer/gpt-4.jsonl"]
            path = find_file(
                self._data, self._names + plain, "reference answers for math, reasoning and coding", _ORIGIN
            )
            self._answers = read_answers(path)
        if name not in self._answers.turns:
            raise UserError(f"{self._answers.path}: wanted a reference answer to question {name}, got none")
        return self._answers.turns[name]
