"""study.yaml: which runs a study consists of, checked; a grid of methods, sizes, label noise, beta, models and answers."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from fasttrain.config import read_yaml_mapping
from fasttrain.errors import UserError, did_you_mean
from fasttrain.files import user_path
from fasttrain.study.run import Method, Run
from fasttrain.study.scores import right_answers

METHODS: tuple[str, ...] = get_args(Method)
_AXES = ("method", "model", "answers", "pairs", "flip", "beta")


@dataclass(frozen=True)
class AnswerSource:
    """Graded answers that runs are trained on: annotations of one model's samples."""

    annotations: Path
    questions: Path | None = None
    image_root: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """Questions with right answers (scored by exact match), or a benchmark of `fasttrain eval`.

    steer: the five scores that SteerLM models are asked for, as `fasttrain-data steer --scores` takes them.
    """

    questions: Path | None = None
    benchmark: str | None = None
    data: Path | None = None
    image_root: Path | None = None
    max_new_tokens: int | None = None
    steer: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A whole study. Paths are absolute, so that its commands and their notes are the same wherever it is started.

    launcher: what starts a training in place of `fasttrain`, as `torchrun --nproc_per_node=4 -m fasttrain`.
    """

    file: Path
    output: Path
    recipe: Path
    models: dict[str, str]
    answers: dict[str, AnswerSource]
    runs: list[Run]
    evaluations: dict[str, Evaluation]
    pair: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    launcher: tuple[str, ...] = ("fasttrain",)
    usd_per_hour: float | None = None
    watts: float | None = None


def load_study(path: Path) -> Study:
    """Read and check a study file; UserError names the first mistake."""
    raw = read_yaml_mapping(path, "study file")
    try:
        return _study(path, raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _study(path: Path, raw: dict[str, Any]) -> Study:
    known = (
        "output",
        "recipe",
        "models",
        "answers",
        "runs",
        "evaluate",
        "pair",
        "settings",
        "launcher",
        "usd_per_hour",
        "watts",
    )
    _check_keys(raw, known, "")
    folder = path.parent.resolve()
    models = _mapping(raw, "models", str)
    answers = {
        name: _entry(AnswerSource, value, f"answers.{name}", folder, ("annotations",))
        for name, value in _mapping(raw, "answers", dict).items()
    }
    evaluations = {
        name: _evaluation(value, f"evaluate.{name}", folder)
        for name, value in _mapping(raw, "evaluate", dict).items()
    }
    runs = _runs(raw.get("runs"), list(models), list(answers))
    settings = _mapping(raw, "settings", dict, optional=True)
    _check_keys(settings, ("all", *METHODS), "settings.")
    pair = _mapping(raw, "pair", object, optional=True)
    _check_keys(pair, ("score", "margin", "rejected", "seed", "answers", "held_out", "take"), "pair.")
    return Study(
        file=folder / path.name,
        output=folder / _text(raw, "output"),
        recipe=_existing(folder, _text(raw, "recipe"), "recipe"),
        models={name: _model_name(value, folder) for name, value in models.items()},
        answers=answers,
        runs=runs,
        evaluations=evaluations,
        pair=pair,
        settings=settings,
        launcher=_launcher(raw),
        usd_per_hour=_number(raw, "usd_per_hour"),
        watts=_number(raw, "watts"),
    )


def _runs(raw: Any, models: list[str], answers: list[str]) -> list[Run]:
    """Every combination of each entry's values, each once, in the order they are named."""
    if not isinstance(raw, list) or not raw:
        raise UserError(f"runs: wanted a list of runs, got {raw!r}")
    runs: dict[Run, None] = {}
    for number, entry in enumerate(raw):
        where = f"runs.{number}."
        if not isinstance(entry, dict):
            raise UserError(f"{where.rstrip('.')}: wanted keys such as method, got {entry!r}")
        _check_keys(entry, _AXES, where)
        defaults = {
            "method": "dpo",
            "model": models[0],
            "answers": answers[0],
            "pairs": None,
            "flip": 0.0,
            "beta": None,
        }
        axes = [_values(entry.get(axis, defaults[axis])) for axis in _AXES]
        for values in itertools.product(*axes):
            run = dict(zip(_AXES, values, strict=True))
            _check_run(run, where, models, answers)
            runs[Run(**run, first_model=models[0], first_answers=answers[0])] = None
    return list(runs)


def _check_run(run: dict[str, Any], where: str, models: list[str], answers: list[str]) -> None:
    for axis, allowed in (("method", METHODS), ("model", models), ("answers", answers)):
        if run[axis] not in allowed:
            wanted = f"{where}{axis}: wanted {' or '.join(allowed)}, got {run[axis]!r}"
            raise UserError(wanted + did_you_mean(str(run[axis]), list(allowed)))
    pairs, flip, beta = run["pairs"], run["flip"], run["beta"]
    if pairs is not None and (type(pairs) is not int or pairs < 1):
        raise UserError(f"{where}pairs: wanted whole numbers of at least 1, got {pairs!r}")
    if isinstance(flip, bool) or not isinstance(flip, int | float) or not 0 <= flip <= 1:
        raise UserError(f"{where}flip: wanted shares from 0 to 1, got {flip!r}")
    if beta is not None and (isinstance(beta, bool) or not isinstance(beta, int | float) or beta <= 0):
        raise UserError(f"{where}beta: wanted positive numbers, got {beta!r}")
    for axis, value in (("flip", flip), ("beta", beta)):
        if value and run["method"] != "dpo":
            raise UserError(f"{where}{axis}: wanted only with method dpo, got it with {run['method']}")


def _evaluation(raw: dict[str, Any], where: str, folder: Path) -> Evaluation:
    given = _entry(Evaluation, raw, where, folder, ())
    if (given.questions is None) == (given.benchmark is None):
        raise UserError(
            f"{where}: wanted questions or benchmark, got {'both' if given.questions else 'neither'}"
        )
    if given.questions:
        try:
            right_answers(given.questions)
        except UserError as error:
            raise UserError(f"{where}.questions: {error}") from None
    if given.benchmark:
        _check_benchmark(given.benchmark, given.options, where)
    if given.questions and given.data is not None:
        raise UserError(f"{where}.data: wanted only beside benchmark, got {str(given.data)!r}")
    if given.benchmark and given.data is None:
        raise UserError(f"{where}.data: wanted the benchmark's folder, got nothing")
    if given.steer is not None and (not isinstance(given.steer, str) or given.questions is None):
        raise UserError(
            f"{where}.steer: wanted five scores such as 4,4,4,2,2 beside questions, got {given.steer!r}"
        )
    return given


def _check_benchmark(name: Any, options: tuple[str, ...], where: str) -> None:
    """UserError for a name that `fasttrain eval` does not know, and for a judged benchmark without its judge."""
    from fasttrain.evaluate.command import NAMES
    from fasttrain.evaluate.judging import JUDGED

    if name not in NAMES:
        wanted = f"{where}.benchmark: wanted {' or '.join(NAMES)}, got {name!r}"
        raise UserError(wanted + did_you_mean(str(name), list(NAMES)))
    if "--judge-dry-run" in options or (
        name in JUDGED and not any(word == "--judge" or word.startswith("--judge=") for word in options)
    ):
        raise UserError(
            f"{where}.options: wanted a judge for {name}, as [--judge, MODEL], got "
            f"{' '.join(options) or 'nothing'}: without one it has no scores"
        )


def _entry(kind: type, raw: dict[str, Any], where: str, folder: Path, needed: tuple[str, ...]) -> Any:
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    _check_keys(raw, tuple(fields), where + ".")
    for name in needed:
        if raw.get(name) is None:
            raise UserError(f"{where}.{name}: wanted a value, got nothing")
    values = {}
    for name, value in raw.items():
        hint = fields[name].type
        if value is not None and "Path" in hint:
            if not isinstance(value, str):
                raise UserError(f"{where}.{name}: wanted a path, got {value!r}")
            value = _existing(folder, value, f"{where}.{name}")
        elif name == "options":
            value = tuple(str(option) for option in (value if isinstance(value, list) else [value]))
        elif value is not None and "int" in hint and (type(value) is not int or value < 1):
            raise UserError(f"{where}.{name}: wanted a whole number of at least 1, got {value!r}")
        values[name] = value
    return kind(**values)


def _existing(folder: Path, value: str, key: str) -> Path:
    path = folder / user_path(value)
    if not path.exists():
        raise UserError(f"{key}: wanted an existing file or folder, got {path}")
    return path


def _model_name(value: str, folder: Path) -> str:
    """A folder beside the study file, or a hub id."""
    return str(folder / value) if (folder / value).is_dir() else value


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{key}: wanted a path, got {value!r}")
    return value


def _launcher(raw: dict[str, Any]) -> tuple[str, ...]:
    """Words in front of `dpo` or `sft`; UserError for a text that is no command or starts something else."""
    if raw.get("launcher") is None:
        return ("fasttrain",)
    try:
        words = tuple(shlex.split(_text(raw, "launcher")))
    except ValueError as error:
        raise UserError(f"launcher: wanted a command, got {raw['launcher']!r} ({error})") from None
    if not words or words[-1] != "fasttrain":
        raise UserError(
            f"launcher: wanted a command that ends in fasttrain, as torchrun --nproc_per_node=4 -m fasttrain, got "
            f"{raw['launcher']!r}"
        )
    return words


def _number(raw: dict[str, Any], key: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UserError(f"{key}: wanted a number of at least 0, got {value!r}")
    return float(value)


def _mapping(raw: dict[str, Any], key: str, kind: type, optional: bool = False) -> dict[str, Any]:
    value = raw.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, dict) or (not value and not optional):
        raise UserError(f"{key}: wanted names and their values, got {value!r}")
    for name, entry in value.items():
        if not isinstance(entry, kind):
            raise UserError(
                f"{key}.{name}: wanted {'text' if kind is str else 'keys and values'}, got {entry!r}"
            )
    return {str(name): entry for name, entry in value.items()}


def _check_keys(raw: dict[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in raw:
        if key not in names:
            hint = did_you_mean(str(key), names) or f"; wanted one of {', '.join(names)}"
            raise UserError(f"unknown key {where}{key}{hint}")
