"""Eval output folders -> evaluations: whose they are, of which benchmark, and each question's parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.evaluate.comparing.benchmarks import BENCHMARKS, Benchmark
from fasttrain.evaluate.comparing.resampling import Floats
from fasttrain.evaluate.results import RESULTS, Result, read_results
from fasttrain_data.errors import BadRow

Key = tuple[str, str]  # stratum, question


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on one benchmark. parts: per stratum and question (sorted), the sums of its results' parts.

    units: what tells the same question in several strata; empty where not every result says it. setting: what other evaluations
    must share to compare (`Benchmark.setting`).
    """

    model: str
    name: str
    folder: Path
    results: tuple[Result, ...]
    judge: str | None
    setting: str
    parts: dict[Key, tuple[float, ...]]
    units: dict[Key, str]

    @property
    def strata(self) -> list[str]:
        return sorted({stratum for stratum, _ in self.parts})

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]

    @property
    def scored(self) -> list[Result]:
        return [result for result in self.results if result.score is not None]

    @property
    def mean_chars(self) -> float:
        """Mean length of the scored answers."""
        lengths = [result.answer_chars for result in self.scored]
        return sum(lengths) / len(lengths) if lengths else math.nan

    @property
    def excluded(self) -> dict[str, int]:
        return dict(Counter(result.status for result in self.results if result.score is None))


def on_what_both_have(one: Evaluation, other: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Both with the results alone that are scored in both: of a question of two turns, one may be."""
    both = _scored_by_id(one).keys() & _scored_by_id(other).keys()

    def restricted(evaluation: Evaluation) -> Evaluation:
        results = tuple(r for r in evaluation.scored if (one.benchmark.stratum(r), r.id) in both)
        return replace(
            evaluation, results=results, parts=_sum_parts(one.benchmark, results, evaluation.folder / RESULTS)
        )

    return restricted(one), restricted(other)


def asked_alone(one: Evaluation, other: Evaluation) -> set[Key]:
    """The questions of which something was scored in one of the two only."""
    ours, theirs = _scored_by_id(one), _scored_by_id(other)
    either = ours | theirs
    return {either[key] for key in ours.keys() ^ theirs.keys()}


def _scored_by_id(evaluation: Evaluation) -> dict[Key, Key]:
    """(stratum, id) of every scored result -> (stratum, question)."""
    stratum = evaluation.benchmark.stratum
    return {(stratum(r), r.id): (stratum(r), str(r.question_id)) for r in evaluation.scored}


def group_units(keys: Sequence[Key], units: dict[Key, str]) -> list[list[Key]]:
    """The keys of each question that is drawn as one, in the keys' order."""
    groups: dict[Key | str, list[Key]] = {}
    for key in keys:
        groups.setdefault(units.get(key, key), []).append(key)
    return list(groups.values())


def strata_of(
    evaluation: Evaluation, keys: Sequence[Key] | None = None, units: dict[Key, str] | None = None
) -> list[Floats]:
    """(Q_i, S * K): a question's parts, standing in its strata's columns; questions of the same strata are drawn together."""
    keys = sorted(evaluation.parts) if keys is None else keys
    units = evaluation.units if units is None else units
    names = sorted({stratum for stratum, _ in keys})
    width = len(next(iter(evaluation.parts.values()), ()))
    rows: dict[tuple[str, ...], list[Floats]] = {}
    for group in group_units(keys, units):
        row = np.zeros((len(names), width))
        for stratum, question in group:
            row[names.index(stratum)] += evaluation.parts[stratum, question]
        rows.setdefault(tuple(sorted({stratum for stratum, _ in group})), []).append(row.ravel())
    return [np.array(found) for found in rows.values()]


def read_evaluations(arguments: Sequence[str]) -> list[Evaluation]:
    """One evaluation per folder that holds a scores.json: each argument, or the folders right below it.

    An argument may be NAME=FOLDER. The folders in a folder are one model's benchmarks; when a benchmark stands there twice they
    are several models', named by their folders. UserError for folders without results and for two evaluations of one name.
    """
    found: dict[tuple[str, str], Evaluation] = {}
    for argument in arguments:
        for evaluation in _read_argument(argument):
            key = (evaluation.model, evaluation.name)
            if key in found:
                raise UserError(
                    f"{evaluation.folder} and {found[key].folder} both say {evaluation.model!r} on {evaluation.name}: "
                    "name them, NAME=FOLDER"
                )
            found[key] = evaluation
    return list(found.values())


def _read_argument(argument: str) -> Iterator[Evaluation]:
    name, sign, rest = argument.partition("=")
    folder = Path(rest if sign and not Path(argument).exists() else argument)
    given = name if sign and folder == Path(rest) else None
    if given == "":
        raise UserError(f"{argument}: wanted NAME=FOLDER, got no name")
    if not folder.is_dir():
        raise UserError(f"{folder}: wanted a folder that `fasttrain eval` wrote, got nothing there")
    if (folder / "scores.json").is_file():
        yield read_evaluation(folder, given)
        return
    below = sorted(path.parent for path in folder.glob("*/scores.json"))
    if not below:
        raise UserError(f"{folder}: wanted scores.json in it or in the folders in it, got none")
    evaluations = [read_evaluation(path, given or folder.resolve().name) for path in below]
    if given is None and len({evaluation.name for evaluation in evaluations}) < len(evaluations):
        evaluations = [replace(evaluation, model=evaluation.folder.name) for evaluation in evaluations]
    yield from evaluations


def read_evaluation(folder: Path, model: str | None = None) -> Evaluation:
    """The evaluation in one folder; UserError names the file that is missing or broken."""
    with mistakes_of_data_tools():
        return _read(folder, model)


def _read(folder: Path, model: str | None) -> Evaluation:
    from fasttrain.evaluate.judging.inputs import read_object

    path = folder / "scores.json"
    scores = read_object(path)
    name = scores.get("benchmark")
    if name == "mt-bench" and scores.get("mode") == "pairwise":
        name = "mt-bench-pairs"
    if name not in BENCHMARKS:
        raise UserError(f"{path}: benchmark: wanted one of {', '.join(BENCHMARKS)}, got {name!r}")
    if not (folder / RESULTS).is_file():
        raise UserError(
            f"{folder}: wanted {RESULTS} beside scores.json, got none: run `fasttrain eval` again"
        )
    results = tuple(read_results(folder / RESULTS))
    evaluation = Evaluation(
        model=model or str(scores.get("model") or folder.resolve().name),
        name=name,
        folder=folder,
        results=results,
        judge=_judge_of(scores),
        setting=BENCHMARKS[name].setting(scores),
        parts=_sum_parts(BENCHMARKS[name], results, folder / RESULTS),
        units=_units(BENCHMARKS[name], results),
    )
    if not evaluation.parts:
        raise UserError(
            f"{folder / RESULTS}: wanted scored answers, got {len(results)} rows and none with a score"
        )
    return evaluation


def _sum_parts(benchmark: Benchmark, results: Sequence[Result], path: Path) -> dict[Key, tuple[float, ...]]:
    """Parts by question; a question none of whose answers was scored is left out."""
    sums: dict[Key, tuple[float, ...]] = {}
    for number, result in enumerate(results, start=1):
        if result.score is None:
            continue
        try:
            key, parts = (benchmark.stratum(result), str(result.question_id)), benchmark.parts(result)
        except (KeyError, TypeError, ValueError) as error:
            wanted = "the columns of this benchmark"
            raise BadRow(path, f"line {number}", str(error).strip("'"), wanted, result.row()) from None
        before = sums.get(key)
        sums[key] = parts if before is None else tuple(a + b for a, b in zip(before, parts, strict=True))
    return dict(sorted(sums.items()))


def _units(benchmark: Benchmark, results: Sequence[Result]) -> dict[Key, str]:
    units = {}
    for result in results:
        unit = benchmark.unit(result)
        if unit is None:
            return {}
        units[benchmark.stratum(result), str(result.question_id)] = str(unit)
    return units


def _judge_of(scores: dict[str, Any]) -> str | None:
    judge = scores.get("judge")
    if not isinstance(judge, dict):
        return None
    versions = judge.get("versions") or {judge.get("model"): 1}
    return ", ".join(sorted(map(str, versions)))
