"""AlpacaEval 1: a judge ranks the model's answer and a reference's; the score is the share of wins, ties half."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasttrain.evaluate.judging import outcome
from fasttrain.evaluate.judging.calls import JudgeCalls, Judgment
from fasttrain.evaluate.judging.inputs import Gaps, find_file, insert, model_name, text_of
from fasttrain.evaluate.judging.options import JudgeOptions
from fasttrain.evaluate.judging.parsing import preferred_of
from fasttrain.evaluate.judging.request import JudgeRequest
from fasttrain.evaluate.results import Result, write_results
from fasttrain_data.errors import UserError
from fasttrain_data.ids import content_hash, rng_of
from fasttrain_data.jsonl import Row, read_rows, write_text

OUTPUT_TOKENS = 100
PROMPT_NAMES = ("judge_prompt.txt", "alpaca_eval.txt")
REFERENCE_NAMES = (
    "text_davinci_003_outputs.json",
    "text_davinci_003.json",
    "reference_outputs.json",
    "alpaca_eval.json",
    "text_davinci_003/model_outputs.json",
)
_ORIGIN = "huggingface.co/datasets/tatsu-lab/alpaca_eval, file alpaca_eval.json; or give --baseline FILE"
_BLOCK = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One instruction and both outputs. swapped: whether the judge sees the model's answer as model_1."""

    instruction: str
    dataset: str | None
    reference: str
    output: str
    swapped: bool

    @property
    def same(self) -> bool:
        return self.reference == self.output


class AlpacaEval:
    """Every instruction that both the reference and the model answered."""

    def __init__(self, data: Path, answers: Path, options: JudgeOptions) -> None:
        self.options = options
        self.prompt = _read_prompt(data, options)
        path = options.baseline or find_file(data, REFERENCE_NAMES, "the reference's outputs", _ORIGIN)
        references, _ = _read_outputs(path)
        given, self.duplicates = _read_outputs(answers)
        self.reference_model = model_name(path, references.values(), "generator")
        self.model = model_name(answers, given.values(), "generator")
        self.gaps = Gaps()
        self.items = [
            Item(
                instruction=name,
                dataset=references[name].get("dataset"),
                reference=references[name]["output"],
                output=given[name]["output"],
                swapped=rng_of("alpaca-eval", options.seed, name).random() < 0.5,
            )
            for name in self.gaps.answered(references, given, answers, options)
        ]

    def requests(self) -> list[JudgeRequest]:
        """One request per instruction; equal outputs need none."""
        return [self._request(number, item) for number, item in enumerate(self.items) if not item.same]

    def score(self, calls: JudgeCalls, out: Path) -> dict[str, Any]:
        replies = iter(calls.ask(self.requests()))
        judged = [(item, None if item.same else next(replies)) for item in self.items]
        results = [_result(*pair) for pair in judged]
        self._write_official(out, judged, results)
        write_results(out, results)
        scored = [result.score for result in results if result.score is not None]
        win_rate = outcome.mean_score(results, 100)
        return outcome.shared_scores("alpaca-eval", self.model, win_rate, results) | {
            "judge_prompt": content_hash(self.prompt),
            "judge_temperature": self.options.heat(0.0),
            "win_rate": win_rate,
            "standard_error": _standard_error(scored),
            "wins": scored.count(1.0),
            "losses": scored.count(0.0),
            "ties": scored.count(0.5),
            "reference": self.reference_model,
            "reference_mean_answer_chars": outcome.mean([len(item.reference) for item in self.items]),
            "win_rate_when_shown_first": _when(judged, results, shown_first=True),
            "win_rate_when_shown_second": _when(judged, results, shown_first=False),
            "duplicate_answers": self.duplicates,
        }

    def _request(self, number: int, item: Item) -> JudgeRequest:
        outputs = (item.output, item.reference) if item.swapped else (item.reference, item.output)
        values = {"instruction": item.instruction, "output_1": outputs[0], "output_2": outputs[1]}
        blocks = {role: insert(text, values) for role, text in self.prompt.items()}
        return JudgeRequest(
            model=self.options.model,
            server=self.options.server,
            system=blocks.get("system"),
            prompt=blocks["user"],
            temperature=self.options.heat(0.0),
            max_output_tokens=self.options.tokens(OUTPUT_TOKENS),
            about=f"instruction {number + 1}",
            likely_tokens=40,
        )

    def _write_official(
        self, out: Path, judged: list[tuple[Item, Judgment | None]], results: list[Result]
    ) -> None:
        """annotations.json and leaderboard.csv as alpaca_eval writes them; preference 2 is the model, 1 the reference."""
        rows = [
            {
                "instruction": item.instruction,
                "dataset": item.dataset,
                "output_1": item.reference,
                "generator_1": self.reference_model,
                "output_2": item.output,
                "generator_2": self.model,
                "annotator": self.options.model,
                "preference": None if result.score is None else 1 + result.score,
                "raw_completion": judgment.text if judgment else None,
                "is_switched_outputs": item.swapped,
            }
            for (item, judgment), result in zip(judged, results, strict=True)
        ]
        write_text(out / "annotations.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        scored = [result.score for result in results if result.score is not None]
        counts = [scored.count(1.0), scored.count(0.0), scored.count(0.5), len(scored)]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        head = [
            "win_rate",
            "standard_error",
            "n_wins",
            "n_wins_base",
            "n_draws",
            "n_total",
            "mode",
            "avg_length",
        ]
        writer.writerow(["", *head])
        rates = [outcome.mean_score(results, 100), _standard_error(scored)]
        writer.writerow([self.model, *rates, *counts, "community", round(outcome.mean_chars(results) or 0)])
        write_text(out / "leaderboard.csv", buffer.getvalue())


def _result(item: Item, judgment: Judgment | None) -> Result:
    """Named by its instruction, so that comparisons pair files whose rows are in another order or not all there."""
    score, status = None, "ok"
    if judgment is None:
        score = 0.5
    elif judgment.text is None:
        status = judgment.status
    else:
        first = preferred_of(judgment.text)
        status = "ok" if first else outcome.PARSE_FAILED
        score = None if first is None else float((first == 1) == item.swapped)
    name = content_hash("alpaca-eval", item.instruction)[:16]
    return Result(
        id=name,
        question_id=name,
        category=item.dataset,
        score=score,
        answer_chars=len(item.output),
        status=status,
        extra={"shown_first": item.swapped},
    )


def _when(
    judged: list[tuple[Item, Judgment | None]], results: list[Result], *, shown_first: bool
) -> float | None:
    """The win rate over the rows where the model stood there: far apart, they show a judge that looks at places."""
    chosen = [
        result
        for (item, judgment), result in zip(judged, results, strict=True)
        if judgment is not None and item.swapped is shown_first
    ]
    return outcome.mean_score(chosen, 100)


def _standard_error(scores: list[float]) -> float | None:
    """In per cent, with n - 1, as pandas' sem."""
    n = len(scores)
    if n < 2:
        return None
    middle = sum(scores) / n
    return 100 * math.sqrt(sum((score - middle) ** 2 for score in scores) / (n - 1) / n)


def _read_prompt(data: Path, options: JudgeOptions) -> dict[str, str]:
    """{"system": ..., "user": ...} of --judge-prompt, else alpaca_eval.txt in --data, else ours."""
    places = [options.prompt] if options.prompt else [data / name for name in PROMPT_NAMES]
    path = next((place for place in places if place.is_file()), None)
    asset = files("fasttrain.evaluate.judging") / "assets" / "alpaca_eval.txt"
    text = path.read_text(encoding="utf-8") if path else asset.read_text(encoding="utf-8")
    where = path or Path(str(asset))
    blocks = dict(_BLOCK.findall(text)) or {"user": text}
    if "user" not in blocks:
        raise UserError(f"{where}: wanted a block <|im_start|>user ... <|im_end|>, got {', '.join(blocks)}")
    for name in ("{instruction}", "{output_1}", "{output_2}"):
        if name not in blocks["user"]:
            raise UserError(f"{where}: wanted {name} in the prompt, got none")
    return blocks


def _read_outputs(path: Path) -> tuple[dict[str, Row], int]:
    """({instruction: row}, repeated instructions) of an outputs file: a list of {instruction, output, generator}."""
    found: dict[str, Row] = {}
    rows = 0
    for place, row in read_rows(path):
        text_of(path, place, row, "output")
        found[text_of(path, place, row, "instruction")] = row
        rows += 1
    if not found:
        raise UserError(f"{path}: wanted a list of {{instruction, output}}, got no rows")
    return found, rows - len(found)
