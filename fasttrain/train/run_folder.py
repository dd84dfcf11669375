"""The run folder: refused when in use, compared on resume, and what stands in it besides metrics and checkpoints."""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.config import DPOConfig, read_yaml_mapping
from fasttrain.errors import UserError
from fasttrain.files import delete_whole, remove_leftovers, user_path, write_atomic, write_json
from fasttrain.ranks import ranks
from fasttrain.run_lines import read_steps
from fasttrain.train.run_lock import RunLock

# In the order of deletion. As long as there are checkpoints, config.yaml keeps `--resume` with another recipe from them.
OURS = (
    "checkpoints", "environment.json", "metrics.jsonl", "skipped.jsonl", "report.html", "plots",
    "final", "tensorboard", "watch_start.json", "pair_changes.jsonl", "config.yaml",
)  # fmt: skip
MAY_CHANGE = {
    "train.max_steps", "train.epochs", "train.log_every", "train.eval_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.output", "data.workers", "track",
    "train.tokens_per_pack", "train.gradient_checkpointing", "distributed.zero_stage", "distributed.deepspeed_config",
}  # fmt: skip


def check_output(config: DPOConfig, command: str, *, resume: bool, overwrite: bool) -> None:
    """UserError if the folder is in use and the user has not said what to do, or holds a run of another recipe, or a damaged one."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite: wanted one of them, got both")
    folder = user_path(config.train.output)
    may_exist = resume or overwrite
    if not may_exist and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"train.output: {folder} is in use; --resume goes on with it, --overwrite starts anew"
        )
    if resume:
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "pair_changes.jsonl"):
            if (folder / name).exists() and not (folder / name).is_file():  # a pipe's reading may never end
                raise UserError(f"--resume: {folder / name}: wanted a file, got a folder, pipe or device")
        _check_same_command(folder, command)
        _check_same_recipe(folder, config)
        for name in ("metrics.jsonl", "pair_changes.jsonl"):
            read_steps(folder / name)  # they will be cut back: a line that cannot be read is told before that


def open_run_folder(config: DPOConfig, command: str, lock: RunLock, *, resume: bool, overwrite: bool) -> Path:
    """Make and lock the folder, clear it if it is to be overwritten, write config.yaml; UserError as `check_output`."""
    folder = user_path(config.train.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.output: cannot make {folder}: {error.strerror}") from None
    lock.take(folder)
    check_output(config, command, resume=resume, overwrite=overwrite)  # again: a run may have begun meanwhile
    if overwrite:
        for name in OURS:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                delete_whole(path)
            else:
                path.unlink(missing_ok=True)
    remove_leftovers(folder)
    write_atomic(folder / "config.yaml", config.to_yaml())
    return folder


def _check_same_command(folder: Path, command: str) -> None:
    before = _read_environment(folder).get("method", command)
    if before != command:
        raise UserError(f"--resume: {folder} is a run of fasttrain {before}, not of fasttrain {command}")


class Began(NamedTuple):
    """What a run keeps from its first start: its day, which the chat template may write, and what `auto` stood for: gradient
    checkpointing and tokens per pack."""

    day: date
    settings: tuple[bool, int] | None = None


def first_start(folder: Path, *, resume: bool) -> Began:
    """How the run in `folder` began, as environment.json has it on resume; else today.

    Every rank calls; it is the first one's for all of them.
    """
    facts = _read_environment(folder) if resume else {}
    names = ("gradient_checkpointing", "tokens_per_pack")
    day, *settings = ranks().gather([str(facts.get("began") or date.today()), *map(facts.get, names)])[0]
    for name, value, kind in zip(names, settings, (bool, int)):
        if value is not None and type(value) is not kind:
            raise UserError(
                f"--resume: {folder / 'environment.json'}: {name}: wanted {kind.__name__}, got {value!r}"
            )
    try:
        return Began(date.fromisoformat(day), None if None in settings else tuple(settings))
    except ValueError:
        raise UserError(
            f"--resume: {folder / 'environment.json'}: began: wanted a date, got {day!r}"
        ) from None


def _read_environment(folder: Path) -> dict[str, Any]:
    """What environment.json holds, {} where there is none; UserError if it cannot be read."""
    path = folder / "environment.json"
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--resume: cannot read {path}: {error}") from None
    if not isinstance(facts, dict):
        raise UserError(f"--resume: {path}: wanted a JSON object, got {type(facts).__name__}")
    return facts


def _check_same_recipe(folder: Path, config: DPOConfig) -> None:
    path = folder / "config.yaml"
    if not path.exists():
        return
    recipe = read_yaml_mapping(path)
    if not recipe:
        raise UserError(
            f"--resume: {path} is empty: it held the recipe that the run began with; --overwrite starts anew"
        )
    before = _flatten(_with_defaults(recipe))
    now = _flatten(config.to_dict())
    different = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in MAY_CHANGE
    ]
    if different:
        raise UserError(f"--resume: the recipe differs from {path}: " + "; ".join(different))


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A run's whole recipe with the defaults of settings that are newer than it."""
    whole = dict(recipe)
    for about in dataclasses.fields(DPOConfig):
        section = about.default_factory() if callable(about.default_factory) else about.default
        if dataclasses.is_dataclass(section) and isinstance(recipe.get(about.name), dict):
            whole[about.name] = dataclasses.asdict(section) | recipe[about.name]  # type: ignore[arg-type]
    return whole


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}."))
    return flat


def write_skipped(folder: Path, entries: list[dict[str, Any]]) -> None:
    """skipped.jsonl: every row that was left out and why; always there, empty when nothing was."""
    write_atomic(
        folder / "skipped.jsonl", "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    )


def write_environment(folder: Path, facts: dict[str, Any]) -> None:
    write_json(folder / "environment.json", facts)
