"""A run folder, read back: metrics, recipe, environment, what was left out. Needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fasttrain.errors import UserError
from fasttrain.run_lines import read_lines, read_steps

Line = dict[str, Any]
_LARGEST = 1e300  # no axis spans more: nan, infinity and what is close to it are left out


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
            (float(line["step"]), float(line[name]))
            for line in self.metrics
            if _is_number(line.get(name)) and abs(line[name]) < _LARGEST
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
    recipe, notes = "", []
    if (folder / "config.yaml").is_file():
        recipe = (folder / "config.yaml").read_text(encoding="utf-8")
    else:
        notes.append("config.yaml is missing: the recipe is not known")
    environment = _read_object(folder / "environment.json")
    if not environment:
        notes.append("environment.json is missing: versions and devices are not known")
    wanted = environment.get("steps")
    if _is_number(wanted) and metrics[-1]["step"] < wanted:
        notes.append(f"the run stands at step {metrics[-1]['step']:,} of {wanted:,}")
    skipped = folder / "skipped.jsonl"
    left_out = read_lines(skipped) if skipped.is_file() else []
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        metrics=metrics,
        config=_flatten(_read_yaml(folder / "config.yaml", recipe)),
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
        whole = _is_number(line.get("step")) and _is_number(line.get("epoch")) and isinstance(pairs, list)
        if not whole or not all(
            isinstance(pair, list) and len(pair) == 4 and all(map(_is_number, pair)) for pair in pairs or []
        ):
            raise UserError(
                f"{path} line {number}: wanted step, epoch and pairs of four numbers, got {str(line)[:60]!r}"
            )
    return lines


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{path}: wanted a JSON object, got something else") from None
    return value if isinstance(value, dict) else {}


def _read_yaml(path: Path, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: wanted YAML, got {' '.join(str(error).split())[:120]}") from None


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}."))
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
