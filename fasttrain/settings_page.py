"""The page of all settings, made from the recipe's dataclasses: `python -m fasttrain.settings_page > docs/settings.md`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

import yaml

from fasttrain.setting_types import is_union, type_name
from fasttrain.settings import DPOConfig

HEAD = """# Settings

Every key of a recipe, its type and default. Unknown keys are errors. `-s key=value` on the command line overrides a recipe; values
are YAML. Relative paths start at the working directory, not at the recipe; paths may start with `~`. This page is made by
`python -m fasttrain.settings_page > docs/settings.md`.
"""

FULL = """
`lora: null` is full fine-tuning: of the language model with its head. A vision tower stays as it is, a projector unless
`model.train_projector` is true.
"""


def settings_page() -> str:
    """The whole page, Markdown."""
    return "\n".join([HEAD, *_sections()])


def _sections() -> Iterator[str]:
    hints = typing.get_type_hints(DPOConfig)
    for entry in dataclasses.fields(DPOConfig):
        section = next(
            (t for t in (hints[entry.name], *typing.get_args(hints[entry.name])) if _is_section(t)), None
        )
        if section is None:
            yield f"## {entry.name}\n"
            yield from _table([(entry.name, hints[entry.name], entry)])
            continue
        nullable = type(None) in typing.get_args(hints[entry.name])
        yield f"## {entry.name}\n" + (FULL if nullable else "")
        types = typing.get_type_hints(section)
        yield from _table([(f"{entry.name}.{f.name}", types[f.name], f) for f in dataclasses.fields(section)])


def _is_section(hint: object) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _table(rows: list[tuple[str, object, dataclasses.Field[object]]]) -> Iterator[str]:
    yield "| key | type | default | |\n|---|---|---|---|"
    for key, hint, entry in rows:
        options = typing.get_args(hint) if is_union(hint) else (hint,)
        kind = " or ".join(type_name(option) for option in options)
        value = entry.default_factory() if callable(entry.default_factory) else entry.default
        default = (
            "required"
            if value == ""
            else f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"
        )
        yield f"| `{key}` | {kind} | {default} | {entry.metadata['doc']} |"
    yield ""


if __name__ == "__main__":
    print(settings_page(), end="")
