"""The commands of `fasttrain-data` as one: each module is imported when its command is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

# name -> module in fasttrain_data.commands, in the order of the way of the data
COMMANDS = {
    "questions": "questions",
    "complete": "complete",
    "annotate": "annotate",
    "pair": "pair",
    "steer": "steer",
    "stats": "stats",
    "review": "review",
    "export": "exchange",
    "import": "exchange",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"fasttrain_data.commands.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="fasttrain-dpo", prog_name="fasttrain-data")
def cli() -> None:
    """From questions and images to preference pairs, file to file.

    questions -> complete -> annotate -> pair. Every stage can be stopped at any moment and started again, and
    never pays twice for work that is done.
    """
