"""LLaVA-Bench: a judge marks the reference answer and the model's from 1 to 10; the score is their ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.evaluate.judging import outcome
from fasttrain.evaluate.judging.calls import JudgeCalls, Judgment
from fasttrain.evaluate.judging.inputs import Gaps, by_id, find_file, model_name, read_object, text_of
from fasttrain.evaluate.judging.options import JudgeOptions
from fasttrain.evaluate.judging.parsing import score_pair_leniently, score_pair_of
from fasttrain.evaluate.judging.request import JudgeRequest
from fasttrain.evaluate.results import Result, write_results
from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.ids import content_hash
from fasttrain_data.jsonl import Row, dump_row, read_rows, write_text

TEMPERATURE, OUTPUT_TOKENS = 0.2, 1024
# the official judge's, llava/eval/eval_gpt_review_bench.py
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_ORIGIN = "part of huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_RULE_ORIGIN = "llava/eval/table/rule.json of github.com/haotian-liu/LLaVA"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question with the reference's answer and the model's. rule: the name of its judge prompt in rule.json."""

    question_id: str | int
    category: str
    rule: str
    question: str
    context: str
    reference: Row
    answer: Row


class LlavaBench:
    """In the wild (context.jsonl: a caption per image) or COCO (captions and boxes), whichever --data holds."""

    def __init__(self, data: Path, answers: Path, options: JudgeOptions) -> None:
        self.options = options
        self.rules = _read_rules(data)
        rows, self.duplicates = by_id(answers)
        self.model = model_name(answers, (row for _, row in rows.values()), "model_id")
        given, self.gaps = {name: row for name, (_, row) in rows.items()}, Gaps()
        self.items = _read_items(data, answers, given, options, self.gaps)
        for item in self.items:
            if item.rule not in self.rules:
                raise UserError(f"{self.rules_path(data)}: wanted the rule {item.rule!r}, got no such key")
            text_of(answers, f"question {item.question_id}", item.answer, "text")

    @staticmethod
    def rules_path(data: Path) -> Path:
        return find_file(data, ("rule.json",), "the judge's rules", _RULE_ORIGIN)

    def requests(self) -> list[JudgeRequest]:
        return [self._request(item) for item in self.items]

    def score(self, calls: JudgeCalls, out: Path) -> dict[str, Any]:
        judgments = calls.ask(self.requests())
        results = [self._result(*pair) for pair in zip(self.items, judgments, strict=True)]
        rows = [
            _official(number, item, judgment)
            for number, (item, judgment) in enumerate(zip(self.items, judgments, strict=True), start=1)
            if judgment.text
            is not None  # LLaVA's tool never gives a failed call up, so it has no form for one
        ]
        name = f"{outcome.file_name(self.model)}.jsonl"
        write_text(out / "reviews" / name, "".join(dump_row(row) + "\n" for row in rows))
        write_results(out, results)
        return self._scores(results, [score_pair_leniently(judgment.text or "") for judgment in judgments])

    def _request(self, item: Item) -> JudgeRequest:
        rule = self.rules[item.rule]
        role, options = rule["role"], self.options
        sections = [("Context", item.context), ("Question", item.question)]
        texts = [f"[{title}]\n{text}\n\n" for title, text in sections]
        for number, answer in ((1, item.reference), (2, item.answer)):
            texts.append(f"[{role} {number}]\n{answer['text']}\n\n[End of {role} {number}]\n\n")
        return JudgeRequest(
            model=options.model,
            server=options.server,
            system=SYSTEM,
            prompt="".join([*texts, f"[System]\n{rule['prompt']}\n\n"]),
            temperature=options.heat(TEMPERATURE),
            max_output_tokens=options.tokens(OUTPUT_TOKENS),
            about=str(item.question_id),
        )

    def _result(self, item: Item, judgment: Judgment) -> Result:
        pair = score_pair_of(judgment.text) if judgment.text is not None else None
        status = judgment.status if judgment.text is None or pair else outcome.PARSE_FAILED
        return Result(
            id=str(item.question_id),
            question_id=item.question_id,
            category=item.category,
            score=pair[1] if pair else None,
            answer_chars=len(item.answer["text"]),
            status=status,
            extra={"reference_score": pair[0] if pair else None},
        )

    def _scores(self, results: list[Result], lenient: Sequence[Any]) -> dict[str, Any]:
        scores = outcome.shared_scores("llava-bench", self.model, ratio(results), results)
        pairs = [(r.extra["reference_score"], r.score) for r in results if r.score is not None]
        failed = sum(result.status == outcome.PARSE_FAILED for result in results)
        readable = [
            pair for result, pair in zip(results, lenient) if result.status == outcome.PARSE_FAILED and pair
        ]
        categories = dict.fromkeys(result.category for result in results)
        return scores | {
            "judge_system": SYSTEM,
            "judge_prompt": content_hash(self.rules),
            "judge_temperature": self.options.heat(TEMPERATURE),
            "reference_mean": outcome.mean([pair[0] for pair in pairs]),
            "model_mean": outcome.mean([pair[1] for pair in pairs]),
            "categories": {
                name: _of([result for result in results if result.category == name]) for name in categories
            },
            "if_parse_failures_were_kept_as_-1": _ratio([*pairs, *[(-1.0, -1.0)] * failed]),
            "parse_failures_with_two_numbers": len(readable),
            "if_those_were_read": _ratio([*pairs, *readable]),
            "duplicate_answers": self.duplicates,
        }


def ratio(results: Sequence[Result]) -> float | None:
    """100 x mean of the model's marks / mean of the reference's, over what was scored."""
    return _ratio([(r.extra["reference_score"], r.score) for r in results if r.score is not None])


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    reference = sum(pair[0] for pair in pairs)
    return 100 * sum(pair[1] for pair in pairs) / reference if reference else None


def _of(results: list[Result]) -> dict[str, Any]:
    return {
        "score": ratio(results),
        "n": sum(result.score is not None for result in results),
        "mean_answer_chars": outcome.mean_chars(results),
    }


def _official(number: int, item: Item, judgment: Judgment) -> dict[str, Any]:
    """A line of LLaVA's review file; [-1, -1] is its mark for words that hold no scores."""
    pair = score_pair_of(judgment.text or "")
    return {
        "id": number,
        "question_id": item.question_id,
        "answer1_id": item.reference.get("answer_id", item.question_id),
        "answer2_id": item.answer.get("answer_id", item.question_id),
        "category": item.rule,
        "content": judgment.text,
        "tuple": list(pair) if pair else [-1, -1],
    }


def _read_rules(data: Path) -> dict[str, dict[str, str]]:
    path = LlavaBench.rules_path(data)
    rules = read_object(path)
    for name, rule in rules.items():
        if not isinstance(rule, dict) or not all(
            isinstance(rule.get(key), str) for key in ("role", "prompt")
        ):
            raise UserError(f'{path}: {name}: wanted {{"role": ..., "prompt": ...}}, got {str(rule)[:60]!r}')
    return rules


def _read_items(
    data: Path, answers: Path, given: dict[Any, Row], options: JudgeOptions, gaps: Gaps
) -> list[Item]:
    path = find_file(data, ("questions.jsonl", "qa90_questions.jsonl"), "the questions", _ORIGIN)
    references_path = find_file(
        data, ("answers_gpt4.jsonl", "qa90_gpt4_answer.jsonl"), "the reference answers", _ORIGIN
    )
    references, _ = by_id(references_path)
    questions, _ = by_id(path)
    prefix, contexts = _read_contexts(data)
    items = []
    for name in gaps.answered(questions, given, answers, options):
        place, row = questions[name]
        image, category = text_of(path, place, row, "image"), text_of(path, place, row, "category")
        if image not in contexts:
            raise BadRow(path, place, "image", "an image that the context file describes", image)
        if name not in references:
            raise UserError(f"{references_path}: wanted an answer to question {name}, got none")
        text_of(references_path, references[name][0], references[name][1], "text")
        items.append(
            Item(
                question_id=name,
                category=category,
                rule=prefix + category,
                question=text_of(path, place, row, "text"),
                context=contexts[image],
                reference=references[name][1],
                answer=given[name],
            )
        )
    return items


def _read_contexts(data: Path) -> tuple[str, dict[str, str]]:
    """(prefix of the rules' names, {image: what the judge is told of it})."""
    path = find_file(
        data, ("context.jsonl", "caps_boxes_coco2014_val_80.jsonl"), "the images' descriptions", _ORIGIN
    )
    contexts, prefix = {}, "llava_bench_"
    for place, row in read_rows(path):
        image = text_of(path, place, row, "image")
        captions = row.get("caption", row.get("captions"))
        if isinstance(captions, str):
            captions = [captions]
        if not isinstance(captions, list) or not all(isinstance(line, str) for line in captions):
            raise BadRow(path, place, "caption", "a string or a list of strings", captions)
        contexts[image] = "\n".join(captions)
        if "instances" in row:  # the COCO set, with its own rules
            prefix = ""
            contexts[image] += "\n\n" + _boxes(path, place, row["instances"])
    return prefix, contexts


def _boxes(path: Path, place: str, instances: Any) -> str:
    try:
        return "\n".join(f"{instance['category']}: {instance['bbox']}" for instance in instances)
    except (TypeError, KeyError):
        wanted = 'a list of {"category": ..., "bbox": ...}'
        raise BadRow(path, place, "instances", wanted, instances) from None
