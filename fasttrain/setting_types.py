"""Plain values, of YAML or of Python, against the types of settings: the value in its type, or a one-line error."""

from __future__ import annotations

import datetime
import math
import numbers
import os
import types
import typing
from typing import Any, Literal

from fasttrain.errors import UserError


def fitted(value: Any, hint: Any, key: str) -> Any:
    """The value in the type that its setting has; UserError if it does not fit."""
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    for option in options:
        matched, result = _match(value, option)
        if matched:
            return result
    wanted = " or ".join(type_name(option) for option in options)
    # 2026-11-23, 0123 and no are values of other types in YAML
    advice = (
        "; put it in quotes"
        if str in options and isinstance(value, (bool, int, float, datetime.date))
        else ""
    )
    if typing.get_origin(hint) is list and not isinstance(value, (list, tuple)):
        advice = "; [] for none" if value in (None, False, "none", "None") else f"; did you mean [{value}]?"
    raise UserError(f"{key}: wanted {wanted}, got {_shown(value)}{advice}")


def _shown(value: Any) -> str:
    try:
        return str(value) if isinstance(value, datetime.date) else repr(value)
    except ValueError:  # Python spells no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _match(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether a value fits one plain type, and the value in that type."""
    if option is type(None):
        return value is None, None
    if typing.get_origin(option) is Literal:
        return type(value) is str and value in typing.get_args(option), value
    if option is bool:
        return isinstance(value, bool), value
    if option is str:
        text = os.fsdecode(value) if isinstance(value, os.PathLike) else value
        return isinstance(text, str) and _can_be_written(text), text
    if option in (int, float):
        return _match_number(value, option)
    if typing.get_origin(option) is list:
        (item,) = typing.get_args(option)
        if not isinstance(value, (list, tuple)):
            return False, None
        matched = [_match(entry, item) for entry in value]
        return all(good for good, _ in matched), [entry for _, entry in matched]
    raise TypeError(f"no rule for {option}")


def _can_be_written(text: str) -> bool:
    """Whether a path can hold it and a UTF-8 file: YAML's escapes can spell NUL and lone surrogates."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _match_number(value: Any, option: type) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):
        return False, None
    try:
        number = float(value)  # PyYAML reads 1e-6 as a string
    except (ValueError, OverflowError):
        return False, None
    if not math.isfinite(number):
        return False, None
    if option is float:
        return True, number
    if isinstance(value, numbers.Integral):
        return True, int(value)
    return number.is_integer(), int(number)


def type_name(option: Any) -> str:
    if option is type(None):
        return "null"
    if typing.get_origin(option) is Literal:
        return " or ".join(typing.get_args(option))
    if typing.get_origin(option) is list:
        return f"a list of {type_name(typing.get_args(option)[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return names.get(option, str(option))
