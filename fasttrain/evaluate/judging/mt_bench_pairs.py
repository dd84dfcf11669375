"""MT-Bench, pairwise: each pair of answers is judged in both orders; verdicts that disagree are a tie."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fasttrain.evaluate.judging import outcome
from fasttrain.evaluate.judging.calls import JudgeCalls, Judgment
from fasttrain.evaluate.judging.inputs import Gaps
from fasttrain.evaluate.judging.mt_bench import (
    API_ERROR,
    Answers,
    Turn,
    judge_request,
    prompts_hash,
    read_answers,
    read_templates,
    read_turns,
)
from fasttrain.evaluate.judging.options import JudgeOptions
from fasttrain.evaluate.judging.parsing import winner_of
from fasttrain.evaluate.judging.request import JudgeRequest
from fasttrain.evaluate.results import Result, write_results
from fasttrain_data.errors import UserError
from fasttrain_data.jsonl import dump_row, write_text

# What the judge calls A and B, as FastChat's model_1 (ours) and model_2 (the baseline), in either game.
_GAMES = ({"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"})


class MTBenchPairs:
    """All turns that the model and the baseline both answered. A turn counts 1 for a win, 0.5 for a tie."""

    def __init__(self, data: Path, answers: Path, options: JudgeOptions) -> None:
        assert options.baseline is not None
        self.options = options
        self.templates = read_templates(data)
        self.answers, self.baseline = read_answers(answers), read_answers(options.baseline)
        self.gaps = Gaps()
        self.turns = list(read_turns(data, self.answers, options, self.gaps))
        for turn in self.turns:
            if len(self.baseline.turns.get(turn.question_id, ())) < turn.number:
                raise UserError(
                    f"{options.baseline}: wanted an answer to question {turn.question_id}, turn {turn.number}, got none"
                )
            if (name := turn.template_name("pair-v2", "pair-math-v1")) not in self.templates:
                path = next(iter(self.templates.values())).path
                raise UserError(f"{path}: wanted the prompt {name!r}, got no such line")

    def requests(self) -> list[JudgeRequest]:
        """Two games for every turn, one after the other."""
        return [
            self._request(turn, *order)
            for turn in self.turns
            for order in ((self.answers, self.baseline), (self.baseline, self.answers))
        ]

    def score(self, calls: JudgeCalls, out: Path) -> dict[str, Any]:
        requests = self.requests()
        judgments = calls.ask(requests)
        results, rows = [], []
        for index, turn in enumerate(self.turns):
            games = slice(2 * index, 2 * index + 2)
            results.append(self._result(turn, judgments[games]))
            rows.append(self._official(turn, requests[games], judgments[games]))
        name = outcome.file_name(self.options.model)
        write_text(out / "model_judgment" / f"{name}_pair.jsonl", "".join(dump_row(r) + "\n" for r in rows))
        write_results(out, results)
        return self._scores(results)

    def _request(self, turn: Turn, first: Answers, second: Answers) -> JudgeRequest:
        template = self.templates[turn.template_name("pair-v2", "pair-math-v1")]
        a, b = first.turns[turn.question_id], second.turns[turn.question_id]
        values = turn.reference_values()
        if turn.number == 1:
            values |= {"question": turn.questions[0], "answer_a": a[0], "answer_b": b[0]}
        else:
            values |= {"question_1": turn.questions[0], "question_2": turn.questions[1]}
            values |= {"answer_a_1": a[0], "answer_a_2": a[1], "answer_b_1": b[0], "answer_b_2": b[1]}
        game = 1 if first is self.answers else 2
        return judge_request(self.options, template, values, f"{turn.id} game {game}")

    def _result(self, turn: Turn, judgments: list[Judgment]) -> Result:
        winners = _winners(judgments)
        failed = next((judgment.status for judgment in judgments if judgment.text is None), None)
        if "error" in winners:
            score, status = None, failed or outcome.PARSE_FAILED
        else:
            tie = winners[0] == "tie" or winners[0] != winners[1]
            score, status = (0.5 if tie else 1.0 if winners[0] == "model_1" else 0.0), "ok"
        return Result(
            id=turn.id,
            question_id=turn.question_id,
            category=turn.category,
            score=score,
            answer_chars=len(self.answers.turns[turn.question_id][turn.number - 1]),
            status=status,
            extra={"turn": turn.number, "winners": winners},
        )

    def _official(
        self, turn: Turn, requests: list[JudgeRequest], judgments: list[Judgment]
    ) -> dict[str, Any]:
        winners = _winners(judgments)
        row: dict[str, Any] = {
            "question_id": turn.question_id,
            "model_1": self.answers.model,
            "model_2": self.baseline.model,
            "g1_winner": winners[0],
            "g2_winner": winners[1],
            "judge": [self.options.model, turn.template_name("pair-v2", "pair-math-v1")],
        }
        for number, (request, judgment) in enumerate(zip(requests, judgments, strict=True), start=1):
            row[f"g{number}_user_prompt"] = request.prompt
            row[f"g{number}_judgment"] = API_ERROR if judgment.text is None else judgment.text
        return row | {"turn": turn.number, "tstamp": time.time()}

    def _scores(self, results: list[Result]) -> dict[str, Any]:
        scored = [result for result in results if result.score is not None]
        wins, losses = (sum(result.score == value for result in scored) for value in (1.0, 0.0))
        ties, n = len(scored) - wins - losses, len(scored)
        adjusted = outcome.mean_score(results)
        scores = outcome.shared_scores("mt-bench", self.answers.model, adjusted, results)
        return scores | {
            "mode": "pairwise",
            "judge_prompt": prompts_hash(self.templates),
            "judge_temperature": self.options.heat(0.0),
            "baseline": self.baseline.model,
            "win": wins,
            "loss": losses,
            "tie": ties,
            "inconsistent": sum(r.extra["winners"][0] != r.extra["winners"][1] for r in scored),
            "win_rate": wins / n if n else None,
            "loss_rate": losses / n if n else None,
            "win_rate_adjusted": adjusted,
            "duplicate_answers": self.answers.duplicates,
        }


def _winners(judgments: list[Judgment]) -> list[str]:
    """model_1, model_2, tie or error of both games."""
    verdicts = [winner_of(judgment.text) if judgment.text is not None else None for judgment in judgments]
    return [
        game.get(verdict, "tie") if verdict else "error"
        for game, verdict in zip(_GAMES, verdicts, strict=True)
    ]
