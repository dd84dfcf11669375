"""The steps of a study: what is done is not done again, what failed or was stopped is, and nothing is left running."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttrain.errors import UserError
from fasttrain.study.execute import execute
from fasttrain.study.tasks import Task


def _task(folder: Path, name: str, code: str, after: Path | None = None) -> Task:
    output = folder / name
    text = f"import pathlib, sys\npath = pathlib.Path({str(output)!r})\n{code}"
    return Task(
        kind="train", subject=name, command=("fasttrain", "-c", text), output=output, note=folder / f"{name}.json",
        after=after,
    )  # fmt: skip


@pytest.fixture
def python_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that are Python snippets instead of commands of this project."""
    monkeypatch.setattr(
        "fasttrain.study.execute.executable", lambda command, python: [sys.executable, *command[1:]]
    )


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path: Path, python_tasks: None) -> None:
    count = "path.write_text(path.read_text() + 'x' if path.exists() else 'x')"
    first = _task(tmp_path, "first", count)
    second = _task(
        tmp_path, "second", f"{count}\nraise SystemExit('no luck' if len(path.read_text()) < 2 else 0)"
    )
    third = _task(tmp_path, "third", count, after=first.note)
    with pytest.raises(UserError, match=r"train second: exit code 1: no luck \(all of it in .*second\.log\)"):
        execute([first, second, third], tmp_path / "logs", lambda text: None)
    for _ in range(2):
        execute([first, second, third], tmp_path / "logs", lambda text: None)
    assert [(tmp_path / name).read_text() for name in ("first", "second", "third")] == ["x", "xx", "x"]
    assert second.seconds > first.seconds / 10 > 0
    changed = _task(tmp_path, "first", count + "\n")  # another command for the same result
    execute([changed, third], tmp_path / "logs", lambda text: None)
    assert [(tmp_path / name).read_text() for name in ("first", "third")] == ["xx", "xx"]


def test_what_was_made_from_other_files_is_made_again(tmp_path: Path, python_tasks: None) -> None:
    pairs = tmp_path / "pairs"
    count = "path.write_text(path.read_text() + 'x' if path.exists() else 'x')"
    task = dataclasses.replace(_task(tmp_path, "one", count), inputs=(pairs, tmp_path / "recipe"))
    (tmp_path / "recipe").write_text("r")

    def runs(text: str) -> int:
        pairs.write_text(text)
        execute([task], tmp_path / "logs", lambda text: None)
        return len(task.output.read_text())

    assert [runs("a"), runs("a"), runs("b"), runs("b")] == [1, 1, 2, 2]
    pairs.unlink()
    assert not task.is_done()
    note = json.loads(task.note.read_text())
    del note["inputs"]  # as earlier versions wrote it
    task.note.write_text(json.dumps(note))
    assert task.is_done()


def test_a_command_that_stopped_early_is_no_success(tmp_path: Path, python_tasks: None) -> None:
    """Training ends with code 0 after SIGTERM, without its adapter."""
    with pytest.raises(SystemExit) as stopped:
        execute([_task(tmp_path, "one", "pass")], tmp_path / "logs", lambda text: None)
    assert stopped.value.code == 143


def test_a_benchmark_whose_judge_left_some_out_is_done_and_told(tmp_path: Path, python_tasks: None) -> None:
    """`fasttrain eval` ends with exit code 3 then, its results written; answers that are missing are no results."""
    told: list[str] = []

    def task(name: str, code: str, kind: str = "evaluate") -> Task:
        return dataclasses.replace(_task(tmp_path, name, code), kind=kind)

    ends = "path.write_text('x')\nraise SystemExit(3)"
    done = task("results.jsonl", ends)
    for _ in range(2):
        execute([done], tmp_path / "logs", told.append)
    assert [line.partition(" s;")[2] for line in told if "done in" in line] == [
        f" some answers or judgements are missing, see its log; delete {done.note} to try again"
    ]
    assert told[-1] == "1 of 1 steps are done"
    done.note.unlink()
    for other in (task("results.jsonl", ends, "train"), task("answers.jsonl", ends)):
        with pytest.raises(UserError, match="exit code 3"):
            execute([other], tmp_path / "logs", told.append)
    with pytest.raises(UserError, match="exit code 3"):
        (tmp_path / "results.jsonl").unlink()
        execute([task("results.jsonl", "raise SystemExit(3)")], tmp_path / "logs", told.append)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_a_study_that_is_killed_leaves_no_training_behind(tmp_path: Path) -> None:
    """SIGKILL to the study: the command that it runs is told to stop, and is gone before long."""
    code = f"""
import sys
from pathlib import Path
import fasttrain.study.execute as execute
from fasttrain.study.tasks import Task
execute.executable = lambda command, python: [sys.executable, "-c", command[1]]
folder = Path({str(tmp_path)!r})
wait = f"import os, time; open({{str(folder / 'pid')!r}}, 'w').write(str(os.getpid())); time.sleep(600)"
task = Task(kind="train", subject="a", command=("fasttrain", wait), output=folder / "out", note=folder / "a.json")
execute.execute([task], folder / "logs", print)
"""
    study = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)

    def until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    pid = tmp_path / "pid"
    until(lambda: pid.exists() and pid.read_text() != "")
    assert Path(f"/proc/{pid.read_text()}").exists()
    study.kill()
    study.wait()

    def is_gone() -> bool:
        stat = Path(f"/proc/{pid.read_text()}/stat")
        return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    until(is_gone)
