"""Run the tasks of a study one after another: what is done is not done again, what failed is named with its log."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fasttrain.answering.command import EXIT_TYPED_FAILURES
from fasttrain.errors import UserError
from fasttrain.signals import Terminated, end_with_parent, on_sigterm, terminate
from fasttrain.study.notes import Task, begin, keep_time, succeed
from fasttrain.study.tasks import environment, executable


def execute(tasks: list[Task], logs: Path, echo: Callable[[str], object]) -> None:
    """Run what is not done; UserError at the first task that fails, Terminated when one was told to stop."""
    waiting = sum(not task.is_done() for task in tasks)
    if waiting < len(tasks):
        echo(f"{len(tasks) - waiting} of {len(tasks)} steps are done")
    logs.mkdir(parents=True, exist_ok=True)
    with on_sigterm(terminate):  # so that the running command is told too
        for number, task in enumerate(tasks, start=1):
            if task.is_done():  # asked again: what it uses may have been made anew meanwhile
                continue
            echo(f"[{number}/{len(tasks)}] {task.kind:8} {task.subject} ...")
            seconds = _run(task, logs / f"{task.note.stem}.log")
            echo(f"{'':10}done in {seconds:.1f} s{incomplete(task)}")


def incomplete(task: Task) -> str:
    """What there is to say of a step whose results leave something out; nothing of any other."""
    if not task.is_incomplete:
        return ""
    return f"; some answers or judgements are missing, see its log; delete {task.note} to try again"


def _run(task: Task, log: Path) -> float:
    """Seconds that the command took; its output is in `log`."""
    for path in (task.output, task.note):
        path.parent.mkdir(parents=True, exist_ok=True)
    attempt, start = begin(task), time.monotonic()
    try:
        code = _call(task, log)
    finally:
        attempt = keep_time(task, attempt, time.monotonic() - start)
    left_out = code == EXIT_TYPED_FAILURES and task.may_be_incomplete
    if (code == 0 or left_out) and task.output.exists():
        succeed(task, attempt, incomplete=left_out)
        return time.monotonic() - start
    if code == 0:  # training that was told to stop ends well, without its result
        raise Terminated
    raise UserError(f"{task.kind} {task.subject}: exit code {code}: {_last_line(log)} (all of it in {log})")


def _call(task: Task, log: Path) -> int:
    """The command's exit code; a study that is told to stop tells the command."""
    with log.open("ab") as file:
        file.write(f"\n$ {task.shown}\n".encode())
        file.flush()
        with subprocess.Popen(
            executable(task.command, sys.executable),
            stdout=file,
            stderr=file,
            env=environment(),
            # no training goes on unseen while a study that was killed is started again
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        ) as child:
            try:
                return child.wait()
            except BaseException:
                child.terminate()  # training saves a checkpoint at SIGTERM
                child.wait()
                raise


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
