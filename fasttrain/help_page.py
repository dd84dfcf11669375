"""docs/cli.md: the help of every `fasttrain` command as it is printed. `python -m fasttrain.help_page` writes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fasttrain.cli import cli
from fasttrain.files import write_atomic

_WIDTH = 100
_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": _WIDTH,
    "terminal_width": _WIDTH,
}
_START = """\
# The commands of `fasttrain`

Made from the program itself by `python -m fasttrain.help_page`; a test compares. The commands of `fasttrain-data` are in
[data.md](data.md#commands), the keys of a recipe in [settings.md](settings.md).
"""


def help_page() -> str:
    """The page as Markdown: the list of commands, then each one's help."""
    parent = click.Context(cli, info_name="fasttrain", **_SETTINGS)
    blocks = [_START, _block("fasttrain", cli.get_help(parent))]
    for name in cli.list_commands(parent):
        command = cli.get_command(parent, name)
        assert command is not None
        blocks += _command(name, command, parent)
    return "\n".join(blocks)


def _command(name: str, command: click.Command, parent: click.Context) -> list[str]:
    with command.make_context(name, [], parent=parent, resilient_parsing=True, **_SETTINGS) as context:
        blocks = [_block(f"{parent.info_name} {name}", command.get_help(context))]
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                blocks += _command(inner, found, context)
    return blocks


def _block(title: str, text: str) -> str:
    return f"\n## {title}\n\n```text\n{text}\n```"


if __name__ == "__main__":
    write_atomic(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/cli.md"), help_page() + "\n")
