"""How a command ends: what is said, with which exit code, and what the other ranks of a run are told."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import click

from fasttrain.errors import SharedMistake, UserError, is_out_of_memory
from fasttrain.progress import close_bars, is_first
from fasttrain.rank_watch import fail_all, is_consequence, tell_how_to_go_on
from fasttrain.signals import Terminated, on_sigterm, terminate
from fasttrain_data.errors import visible

_WITH_RESUME = "; what is done is kept, go on with --resume"
_AGAIN = "; what is done is kept, the same command goes on with it"
_HOW_TO_GO_ON = {"dpo": _WITH_RESUME, "sft": _WITH_RESUME} | dict.fromkeys(
    ("reference", "answer", "eval", "study"), _AGAIN
)


def _how_to_go_on() -> str:
    """What to do after the command was stopped: nothing is kept of a dry run, nor by commands that are done in a moment."""
    return "" if "--dry-run" in sys.argv else _HOW_TO_GO_ON.get(sys.argv[1] if sys.argv[1:] else "", "")


def run_to_its_end(cli: click.Group) -> None:
    """Run the command of this process: one line for a user's mistake (exit code 2), Ctrl-C (130) and SIGTERM (143), no traceback."""
    tell_how_to_go_on(_how_to_go_on())
    try:
        with on_sigterm(terminate):
            code = cli(standalone_mode=False, prog_name="fasttrain")
    except SharedMistake as error:
        _fail(str(error), 2, shared=True)
    except UserError as error:
        _fail(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        command = getattr(error, "ctx", None)
        _fail(error.format_message() + (f" (see {command.command_path} --help)" if command else ""), 2)
    except (click.Abort, KeyboardInterrupt) as error:
        fail_all("interrupted", 130)  # says itself how to go on
        first = error.__cause__ if isinstance(error.__cause__, KeyboardInterrupt) else error  # click wraps it
        told = str(first) or _how_to_go_on()
        _fail(f"interrupted{told}", 130)
    except Terminated:
        fail_all("terminated", 143)
        _fail(f"terminated{_how_to_go_on()}", 143)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        where = f": {Path(str(error.filename))}" if error.filename else ""
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{str(error.filename)[:100]}...: {error.strerror}", 2)
        _fail(f"the machine failed: {error.strerror or error}{where}", 1)
    except Exception as error:
        from safetensors import SafetensorError  # what a full disk raises while weights are written

        if isinstance(error, SafetensorError):
            _fail(f"the machine failed: {error}", 1)
        if is_out_of_memory(error):
            _fail(f"out of memory: {str(error) or 'no more of it on this machine'}; lower train.tokens_per_pack, or set "
                  "train.gradient_checkpointing", 1)  # fmt: skip
        close_bars()
        _end_all_ranks(error)
        raise
    else:
        if isinstance(code, int) and code:
            sys.exit(code)


def _fail(message: str, code: int, shared: bool = False) -> None:
    text = visible(" ".join(message.split()))
    close_bars()
    if not shared:
        fail_all(text, code)  # one of several ranks: ends here
    # before ranks meet, every one of a machine finds the same mistake; what fails may be one's own
    if code == 1 or is_first("LOCAL_RANK"):
        click.echo(f"fasttrain: {'' if code in (130, 143) else 'error: '}{text}", err=True)
    sys.exit(code)


def _end_all_ranks(error: Exception) -> None:
    """With several ranks: end them with one message, and the traceback of the one that failed first."""
    import traceback

    first = next(iter(str(error).splitlines()), "")
    trace = "" if is_consequence(error) else "".join(traceback.format_exception(error))
    fail_all(f"{type(error).__name__}: {first}", 1, consequence=is_consequence(error), trace=trace)
