"""What a study found, from the files of its runs: one row a run, differences to the base, time, cost, energy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.evaluate.results import RESULTS
from fasttrain.run_lines import read_steps
from fasttrain.study.notes import Task
from fasttrain.study.run import Run
from fasttrain.study.scores import Score, read_benchmark, score_exactly
from fasttrain.study.spec import Study
from fasttrain.study.tasks import base_name, evaluation_folder, run_folder, tasks_of


@dataclass(frozen=True)
class Row:
    """One model: an untrained one (`run` is None) or a run's.

    train_s, answer_s: None where a step's time is not known. verified: notes say that the study's commands made all of it.
    """

    name: str
    model: str
    run: Run | None
    used: int | None  # pairs or answers it was trained on
    steps: int | None
    last: dict[str, Any]
    train_s: float | None
    answer_s: float | None
    scored: dict[str, Score]
    verified: bool

    @property
    def seconds(self) -> float | None:
        return _total([self.train_s, self.answer_s])


@dataclass(frozen=True)
class Results:
    """Rows in the study's order.

    missing: names of runs that have no scores yet. outdated: of those that were made by other commands, or from other
    files, than the study file names now; the rows are those of neither.
    """

    study: Study
    rows: list[Row]
    missing: list[str]
    outdated: list[str]
    annotation_usd: dict[str, float]
    environment: dict[str, Any]

    def base(self, row: Row) -> Row | None:
        """The untrained model that a row started from."""
        return next((other for other in self.rows if other.run is None and other.model == row.model), None)

    def measure(self, name: str) -> str:
        """An evaluation and what its scores are; its name alone where there are none."""
        return f"{name}: {self.rows[0].scored[name].measure}" if self.rows else name

    def seconds(self) -> float:
        """Of all the rows whose time is known."""
        return sum(row.seconds or 0.0 for row in self.rows)

    def untimed(self) -> list[str]:
        return [row.name for row in self.rows if row.seconds is None]

    def unverified(self) -> list[str]:
        return [row.name for row in self.rows if not row.verified]


def collect(study: Study) -> Results:
    """Read what there is and belongs to the study as its file is now."""
    tasks = tasks_of(study)
    done = {task.note for task in tasks if task.is_done()}
    rows: list[Row] = []
    missing, outdated = [], []
    subjects: list[tuple[str, str, Run | None]] = [
        (base_name(study, model), model, None) for model in dict.fromkeys(run.model for run in study.runs)
    ]
    subjects += [(run.name, run.model, run) for run in study.runs]
    for name, model, run in subjects:
        last = [task for task in tasks if task.kind == "evaluate" and task.subject == name]
        notes = {task.note for task in _all_before(last, tasks)}
        noted = {note for note in notes if note.exists()}
        if not all(map(_has_scores, last)):
            missing.append(name)
        elif not noted <= done:
            outdated.append(name)
        else:
            scored = _scores(study, name)
            rows.append(_row(study, name, model, run, scored, tasks, verified=noted == notes))
    costs = {name: _annotation_cost(source.annotations) for name, source in study.answers.items()}
    return Results(study, rows, missing, outdated, costs, _environment(study, rows))


def _has_scores(task: Task) -> bool:
    # scores.json is what makes a benchmark's folder whole
    return task.output.exists() and (
        task.output.name != RESULTS or (task.output.parent / "scores.json").exists()
    )


def _all_before(last: list[Task], tasks: list[Task]) -> list[Task]:
    """These tasks and all whose results they use."""
    used = [
        task for task in tasks if any(task.output in user.inputs or task.note == user.after for user in last)
    ]
    return [*last, *(_all_before(used, tasks) if used else [])]


def _scores(study: Study, subject: str) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for name, evaluation in study.evaluations.items():
        folder = evaluation_folder(study, subject, name)
        if evaluation.questions is not None:
            found[name] = score_exactly(evaluation.questions, folder / "answers.jsonl")
        else:
            found[name] = read_benchmark(folder, subject)
    return found


def _row(
    study: Study, name: str, model: str, run: Run | None, scored: dict[str, Score], tasks: list[Task],
    *, verified: bool,
) -> Row:  # fmt: skip
    times = {
        kind: _total([task.seconds for task in tasks if task.kind == kind and task.subject == name])
        for kind in ("train", "evaluate")
    }
    last: dict[str, Any] = {}
    used = None
    if run is not None:
        folder = run_folder(study, run)
        lines = read_steps(folder / "metrics.jsonl")
        if not lines:
            raise UserError(f"{folder / 'metrics.jsonl'}: wanted the line of the run's last step, got none")
        last = lines[-1]
        facts = _facts(folder)
        used = facts.get("pairs", facts.get("examples"))
        if used is not None and not isinstance(used, int):
            raise UserError(f"{folder / 'environment.json'}: pairs: wanted a whole number, got {used!r}")
    return Row(
        name, model, run, used, last.get("step"), last, times["train"], times["evaluate"], scored, verified
    )


def _total(seconds: list[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


def _annotation_cost(path: Path) -> float:
    """What the judge's calls cost, as the annotations tell it, in US dollars."""
    from fasttrain_data.jsonl import read_rows

    with mistakes_of_data_tools():
        return sum(float(row.get("cost_usd") or 0.0) for _, row in read_rows(path))


def _environment(study: Study, rows: list[Row]) -> dict[str, Any]:
    for row in rows:
        if row.run is not None:
            return _facts(run_folder(study, row.run))
    return {}


def _facts(folder: Path) -> dict[str, Any]:
    """What a run's environment.json holds; UserError if it is damaged."""
    path = folder / "environment.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{path}: wanted a JSON object, got something else")
    return facts


def energy_kwh(watts: float, seconds: float) -> float:
    """An estimate: the machine's stated draw times the time; nothing is metered."""
    return watts * seconds / 3.6e6


def write_results(results: Results, path: Path) -> None:
    """results.json: everything the table shows, as numbers."""
    from fasttrain.files import write_json

    rows = []
    for row in results.rows:
        entry: dict[str, Any] = {
            "name": row.name,
            "model": row.model,
            "trained_on": row.used,
            "steps": row.steps,
        }
        if row.run is not None:
            axes = ("method", "answers", "pairs", "flip", "beta")
            entry |= {axis: getattr(row.run, axis) for axis in axes}
        entry |= {"train_s": row.train_s, "answer_s": row.answer_s, "verified": row.verified, "scores": {}}
        base = results.base(row)
        for name, scored in row.scored.items():
            low, high = scored.interval()
            found = {"score": scored.value, "low": low, "high": high, "answer_chars": scored.mean_chars}
            if base is not None and row.run is not None:
                found["above_base"], found["above_base_low"], found["above_base_high"] = scored.above(
                    base.scored[name]
                )
            known = {key: value if math.isfinite(value) else None for key, value in found.items()}
            entry["scores"][name] = {"measure": scored.measure, "n": scored.count} | known
        rows.append(entry)
    whole = {"rows": rows, "missing": results.missing, "outdated": results.outdated}
    write_json(path, whole | {"annotation_usd": results.annotation_usd})
