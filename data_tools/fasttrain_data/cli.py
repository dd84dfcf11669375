"""The command `fasttrain-data`: from questions and images to preference pairs, file to file.

Nothing that takes time is imported before `main` runs, which tells of a Ctrl-C from its first moment on.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

from fasttrain_data.errors import EXIT_MISTAKE, UserError, visible
from fasttrain_data.standard_files import open_standard_files


class _Terminated(BaseException):
    """SIGTERM, raised where the program is, so that open work is put away."""


def _terminate(number: int, frame: Any) -> NoReturn:
    raise _Terminated


def main() -> NoReturn:
    """Run the command; one line and exit code 2 for a user's mistake, 130 and 143 for signals."""
    open_standard_files()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run()
    except UserError as error:
        _fail(str(error), EXIT_MISTAKE)
    except KeyboardInterrupt:
        _fail("stopped; start the same command again to go on", 130)
    except _Terminated:
        _fail("terminated; start the same command again to go on", 143)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(str(error), 1)


def _run() -> NoReturn:
    """The command, with the ends that click has names for told by ours."""
    import click

    from fasttrain_data.commands.group import cli

    try:
        sys.exit(cli.main(prog_name="fasttrain-data", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(EXIT_MISTAKE)
    except click.UsageError as error:
        where = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        raise UserError(error.format_message() + where) from None
    except click.ClickException as error:
        raise UserError(error.format_message()) from None
    except click.Abort:
        raise KeyboardInterrupt from None


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"fasttrain-data: {visible(message)}\n")
    sys.exit(code)
