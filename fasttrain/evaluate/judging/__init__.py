"""Benchmarks that a judge scores: MT-Bench, MM-Vet, LLaVA-Bench and AlpacaEval."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Protocol

from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.evaluate.judging.calls import Forecast, JudgeCalls
from fasttrain.evaluate.judging.clients import Client
from fasttrain.evaluate.judging.inputs import Gaps
from fasttrain.evaluate.judging.options import JudgeOptions, judge_options, take_judge_options
from fasttrain.evaluate.judging.outcome import about_judge
from fasttrain.evaluate.judging.request import JudgeRequest

__all__ = [
    "JUDGED",
    "JudgeOptions",
    "forecast_judging",
    "judge_benchmark",
    "judge_options",
    "take_judge_options",
]
JUDGED = ("mt-bench", "mm-vet", "llava-bench", "alpaca-eval")


class _Benchmark(Protocol):
    gaps: Gaps

    def requests(self) -> list[JudgeRequest]: ...

    def score(self, calls: JudgeCalls, out: Path) -> dict[str, Any]: ...


def judge_benchmark(
    bench: str, data: Path, answers: Path, out: Path, judge: JudgeOptions, client: Client | None = None
) -> dict[str, Any]:
    """Judge an answer file in the benchmark's own format; returns what scores.json holds.

    data: folder with the benchmark's files. Writes into `out`: results.jsonl (a row per judged answer), the
    benchmark's official judgment files, and judge.journal.jsonl, from which a rerun takes every reply that was
    paid for. Replies that cannot be read and calls that failed are left out of every mean and counted under
    "excluded", questions without an answer (`judge.partial`) under "missing", answers to no question under "unknown". UserError for mistakes in files or options, and when the server refuses key or model.
    """
    with mistakes_of_data_tools():
        _check_answers(answers)
        benchmark = _read(bench, data, answers, judge)
        with JudgeCalls(out, judge, client) as calls:
            scores = benchmark.score(calls, out)
            scores |= dataclasses.asdict(benchmark.gaps)
            scores["judge"] = about_judge(calls)
    if len(scores["judge"]["versions"]) > 1:
        versions = ", ".join(scores["judge"]["versions"])
        print(
            f"fasttrain: warning: replies of several judge versions in one score: {versions}", file=sys.stderr
        )
    return scores


def forecast_judging(bench: str, data: Path, answers: Path, out: Path, judge: JudgeOptions) -> Forecast:
    """What judging would take, without a call; MM-Vet's second tries are not foreseen."""
    with mistakes_of_data_tools():
        _check_answers(answers)
        benchmark = _read(bench, data, answers, judge)
        with JudgeCalls(out, judge) as calls:
            return calls.forecast(benchmark.requests())


def _read(bench: str, data: Path, answers: Path, judge: JudgeOptions) -> _Benchmark:
    if bench == "mt-bench" and judge.baseline is not None:
        from fasttrain.evaluate.judging.mt_bench_pairs import MTBenchPairs

        return MTBenchPairs(data, answers, judge)
    if bench == "mt-bench":
        from fasttrain.evaluate.judging.mt_bench import MTBench

        return MTBench(data, answers, judge)
    if bench == "mm-vet":
        from fasttrain.evaluate.judging.mm_vet import MMVet

        return MMVet(data, answers, judge)
    if bench == "llava-bench":
        from fasttrain.evaluate.judging.llava_bench import LlavaBench

        return LlavaBench(data, answers, judge)
    if bench == "alpaca-eval":
        from fasttrain.evaluate.judging.alpaca_eval import AlpacaEval

        return AlpacaEval(data, answers, judge)
    raise UserError(f"wanted one of the judged benchmarks {', '.join(JUDGED)}, got {bench!r}")


def _check_answers(answers: Path) -> None:
    if not answers.is_file():
        raise UserError(
            f"--answers: wanted a file, got {'a folder' if answers.is_dir() else 'nothing'} at {answers}"
        )
