"""The command `fasttrain-data`: from questions and images to preference pairs, file to file."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from fasttrain_data.errors import EXIT_MISTAKE, UserError

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


class _Terminated(BaseException):
    """SIGTERM, raised where the program is, so that open work is put away."""


def _terminate(number: int, frame: Any) -> NoReturn:
    raise _Terminated


def main() -> NoReturn:
    """Run the command; one line and exit code 2 for a user's mistake, 130 and 143 for signals."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(cli.main(prog_name="fasttrain-data", standalone_mode=False) or 0)
    except UserError as error:
        _fail(str(error), EXIT_MISTAKE)
    except click.UsageError as error:
        where = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        _fail(error.format_message() + where, EXIT_MISTAKE)
    except click.ClickException as error:
        _fail(error.format_message(), EXIT_MISTAKE)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped; start the same command again to go on", 130)
    except _Terminated:
        _fail("terminated; start the same command again to go on", 143)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"fasttrain-data: {message}", err=True)
    sys.exit(code)
