"""Recipes from YAML and `key=value` overrides to checked settings: unknown keys and wrong types are one-line errors."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fasttrain.errors import UserError, did_you_mean
from fasttrain.other_trainers import NONE_OF_OURS, OURS
from fasttrain.setting_types import is_union
from fasttrain.settings import (
    F_DIVERGENCES,
    LOSS_KINDS,
    TRACKERS,
    DataConfig,
    DistributedConfig,
    DPOConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    ReferenceConfig,
    TrainConfig,
)  # fmt: skip

__all__ = [
    "F_DIVERGENCES", "LOSS_KINDS", "TRACKERS", "DPOConfig", "DataConfig", "DistributedConfig", "LoraConfig", "LossConfig",
    "ModelConfig", "ReferenceConfig", "TrainConfig", "config_from_dict", "load_config",
]  # fmt: skip


_OCTAL = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, and numbers that YAML 1.1 reads as nobody means them: 010 as 8, 1:30 as 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *base` is no key
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, (str, int, float, bool, type(None))):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        text = str(node.value)
        if ":" in text or _OCTAL.fullmatch(text):
            base = "60" if ":" in text else "8"
            problem = f"{text} is a number to the base {base} in YAML; write it in decimal, or in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DPOConfig:
    """Read a recipe and apply `key.sub=value` overrides (values are YAML); UserError names the first mistake."""
    path = Path(path)
    raw = read_yaml_mapping(path)
    settings = _read_overrides(overrides)
    try:
        return _with_settings(raw, settings)
    except UserError as error:
        if str(error) != _mistake_in(raw):  # an override's, which the file has no part in
            raise
        raise UserError(f"{path}: {error}") from None


def _mistake_in(raw: dict[str, Any]) -> str | None:
    """What is wrong with a recipe as its file has it."""
    try:
        _with_settings(raw, [])
    except UserError as error:
        return str(error)
    return None


def read_yaml_mapping(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping that a YAML file holds, {} for an empty one; UserError if it cannot be read as one."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the {what} is not UTF-8 (byte {error.start})") from None
    try:
        raw = _read_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: wanted a mapping of sections, got {type(raw).__name__}")
    return raw


def config_from_dict(raw: dict[str, Any], overrides: Sequence[str] = ()) -> DPOConfig:
    """A checked DPOConfig from nested plain values, or path objects for text, plus `key=value` overrides."""
    return _with_settings(raw, _read_overrides(overrides))


def _with_settings(raw: dict[str, Any], settings: Sequence[tuple[list[str], Any]]) -> DPOConfig:
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    for (*parents, leaf), value in settings:
        target = raw
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        target[leaf] = value
    return typing.cast(DPOConfig, _build(DPOConfig, raw, ""))


def _read_yaml(text: str) -> Any:
    """The value that YAML text stands for; ValueError says in one line what is wrong with it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"line {mark.line + 1}: {problem}" if mark else problem) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except AttributeError:  # PyYAML's, for `!!timestamp 5`
        raise ValueError("a value does not fit its !!tag") from None


def _read_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    if isinstance(overrides, str):
        raise UserError(f"overrides: wanted a list of key=value, got {overrides!r}")
    return [_read_override(override) for override in overrides]


def _read_override(override: str) -> tuple[list[str], Any]:
    """The key's parts and the value of one `key.sub=value`."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"-s {override!r}: wanted key=value, for example -s train.learning_rate=1e-5")
    try:
        return key.split("."), _read_yaml(text)
    except ValueError as error:
        raise UserError(f"-s {override!r}: the value is not valid YAML: {error}") from None


def _build(cls: type, raw: Any, prefix: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.') or 'recipe'}: wanted a section with keys, got {raw!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise UserError(f"unknown key {prefix}{key}" + _suggest(str(key), list(hints), prefix))
        values[key] = _value(value, hints[key], f"{prefix}{key}")
    return cls(**values)


def _suggest(key: str, known: list[str], prefix: str) -> str:
    # a key in the wrong place, like a bare `learning_rate` at top level: point at the section that has it
    sections = typing.get_type_hints(DPOConfig)
    for section, hint in sections.items():
        for cls in [hint, *typing.get_args(hint)]:
            if dataclasses.is_dataclass(cls) and key in {f.name for f in dataclasses.fields(cls)}:
                return f"; did you mean '{section}.{key}'?"
    if key in OURS:  # another trainer's name
        return f"; did you mean {'the option ' if OURS[key].startswith('-') else ''}'{OURS[key]}'?"
    if key in NONE_OF_OURS and not any(name.endswith(f"_{key}") for name in known):  # zero_stage
        return f": {NONE_OF_OURS[key]}"
    if prefix and key in sections:
        return f"; {key!r} stands at the top of the recipe, not in {prefix.rstrip('.')!r}"
    return did_you_mean(key, known) or f"; wanted one of {', '.join(known)}"


def _value(value: Any, hint: Any, key: str) -> Any:
    """A section from its mapping; a plain value as it is: the section that it belongs to puts it in its type."""
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            if value is None and type(None) in options:
                return None
            if type(None) in options and not isinstance(value, dict):
                raise UserError(f"{key}: wanted a section with keys, or null, got {value!r}")
            return _build(option, {} if value is None else value, f"{key}.")
    return value
