"""A run folder, read back: metrics, recipe, environment, what was left out. Needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.config import read_yaml_mapping
from fasttrain.errors import UserError
from fasttrain.run_lines import is_number, read_lines, read_steps

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """config: the resolved recipe by dotted key. skipped: rows left out, by reason. changes: lines of pair_changes.jsonl.

    left_out: the places (file and line) of the rows that were left out.
    """

    name: str
    folder: Path
    metrics: list[Line]
    config: dict[str, Any]
    environment: dict[str, Any]
    skipped: Counter[str]
    recipe: str
    changes: list[Line] | None = None
    left_out: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What a step counts: pairs, or the examples of supervised fine-tuning."""
        return "examples" if self.environment.get("method") == "sft" else "pairs"

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it is a number that can be drawn."""
        points = [
            (float(line["step"]), float(line[name])) for line in self.metrics if is_number(line.get(name))
        ]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, name: str) -> float | None:
        values = self.series(name)[1]
        return values[-1] if values else None

    def total(self, name: str) -> float:
        return sum(self.series(name)[1])


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Each argument is a run folder, or NAME=FOLDER; UserError when two have one name."""
    runs = [_read_argument(argument) for argument in arguments]
    names = Counter(run.name for run in runs)
    for name, count in names.items():
        if count > 1:
            raise UserError(f"two runs are called {name!r}: name them, NAME=FOLDER")
    return runs


def _read_argument(argument: str) -> Run:
    name, sign, rest = argument.partition("=")
    if sign and not Path(argument).exists():
        if not name:
            raise UserError(f"{argument}: wanted NAME=FOLDER, got no name")
        return read_run(Path(rest), name)
    return read_run(Path(argument))


def read_run(folder: Path, name: str | None = None) -> Run:
    """UserError if the folder holds no run, or a file of it is broken."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: wanted a run folder with metrics.jsonl, got none")
    metrics = read_steps(path)
    if not metrics:
        raise UserError(f"{path}: wanted logged steps, got none yet")
    recipe, config, notes = "", {}, []
    if (folder / "config.yaml").is_file():
        config = read_yaml_mapping(folder / "config.yaml")
        recipe = (folder / "config.yaml").read_text(encoding="utf-8")
    else:
        notes.append("config.yaml is missing: the recipe is not known")
    environment = _read_facts(folder / "environment.json")
    if not environment:
        notes.append("environment.json is missing: versions and devices are not known")
    wanted = environment.get("steps")
    if is_number(wanted) and metrics[-1]["step"] < wanted:
        notes.append(f"the run stands at step {metrics[-1]['step']:,} of {wanted:,}")
    skipped = folder / "skipped.jsonl"
    left_out = read_lines(skipped) if skipped.is_file() else []
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        metrics=metrics,
        config=_flatten(config),
        environment=environment,
        skipped=Counter(str(line.get("reason")) for line in left_out),
        recipe=recipe,
        changes=_read_changes(folder / "pair_changes.jsonl"),
        left_out=frozenset(str(line.get("where")) for line in left_out),
        notes=notes,
    )


def _read_changes(path: Path) -> list[Line] | None:
    """None if the run kept none; UserError for a line that is no record of a step."""
    if not path.is_file():
        return None
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        pairs = line.get("pairs")
        whole = is_number(line.get("step")) and is_number(line.get("epoch")) and isinstance(pairs, list)
        if not whole or not all(
            isinstance(pair, list) and len(pair) == 4 and all(map(is_number, pair)) for pair in pairs or []
        ):
            raise UserError(
                f"{path} line {number}: wanted step, epoch and pairs of four numbers, got {str(line)[:60]!r}"
            )
    return lines


def _read_facts(path: Path) -> dict[str, Any]:
    """What environment.json holds, {} where there is none; UserError where it tells the counts of the data in no numbers."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{path}: wanted a JSON object, got something else") from None
    facts = value if isinstance(value, dict) else {}
    data = facts.get("data", {})
    parts = data.values() if isinstance(data, dict) else [data]
    if not all(isinstance(part, dict) and all(map(is_number, part.values())) for part in parts):
        raise UserError(f"{path}: data: wanted numbers by part of the data, got {str(data)[:60]!r}")
    return facts


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}."))
    return flat
