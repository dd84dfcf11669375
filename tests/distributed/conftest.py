"""Several ranks of one run as forked children of this process, which has imported everything: a start costs nothing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 300  # a rank that hangs is killed by SIGALRM


@dataclass(frozen=True)
class Ended:
    """How a run of several ranks ended: exit codes by rank (negative: the signal), and all that was said."""

    codes: list[int]
    stderr: str

    @property
    def messages(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("fasttrain: ")]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(rank: int, size: int, port: int, log: Path, body: Callable[[], None]) -> None:
    """What a launcher gives a rank, then `body`; never returns into pytest."""
    code = 1
    try:
        signal.alarm(LIMIT_S)
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        warnings.simplefilter("ignore")
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (a forked child must not return into pytest)
        import traceback

        traceback.print_exc()
    finally:
        from fasttrain.rank_watch import leave_watch

        leave_watch()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., Ended]:
    """`run_ranks(body, size=2)`: run `body()` in every rank and wait; `body` may ask os.environ["RANK"]."""

    import fasttrain.cli
    import fasttrain.train.loop  # noqa: F401 - once, for all children

    def run(body: Callable[[], None], size: int = 2) -> Ended:
        log = tmp_path / "stderr.txt"
        log.unlink(missing_ok=True)
        port = _free_port()
        children = []
        for rank in range(size):
            pid = os.fork()
            if not pid:
                _child(rank, size, port, log, body)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        return Ended(codes, log.read_text() if log.exists() else "")

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    """`command("dpo", "-c", path)`: a body that runs the command line as a user's process would."""

    def make(*arguments: Any, before: Callable[[], None] = lambda: None) -> Callable[[], None]:
        def body() -> None:
            from fasttrain.cli import main

            before()
            sys.argv = ["fasttrain", *map(str, arguments)]
            main()

        return body

    return make
