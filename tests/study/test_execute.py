"""The steps of a study: what is done is not done again, what failed or was stopped is, and nothing is left running."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError
from fasttrain.signals import Terminated
from fasttrain.study.execute import execute
from fasttrain.study.notes import Task, begin, keep_time, succeed
from fasttrain.study.spec import load_study
from fasttrain.study.tasks import tasks_of

COUNT = "path.write_text(path.read_text() + 'x' if path.exists() else 'x')"


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
    first = _task(tmp_path, "first", COUNT)
    second = _task(
        tmp_path, "second", f"{COUNT}\nraise SystemExit('no luck' if len(path.read_text()) < 2 else 0)"
    )
    third = _task(tmp_path, "third", COUNT, after=first.note)
    with pytest.raises(UserError, match=r"train second: exit code 1: no luck \(all of it in .*second\.log\)"):
        execute([first, second, third], tmp_path / "logs", lambda text: None)
    for _ in range(2):
        execute([first, second, third], tmp_path / "logs", lambda text: None)
    assert [(tmp_path / name).read_text() for name in ("first", "second", "third")] == ["x", "xx", "x"]
    assert second.seconds > first.seconds / 10 > 0
    changed = _task(tmp_path, "first", COUNT + "\n")  # another command for the same result
    execute([changed, third], tmp_path / "logs", lambda text: None)
    assert [(tmp_path / name).read_text() for name in ("first", "third")] == ["xx", "xx"]


@pytest.mark.parametrize("ns", [1, 10**18 * 4])
def test_what_was_made_anew_is_used_anew_whatever_the_clock_says(
    ns: int, tmp_path: Path, python_tasks: None
) -> None:
    """Set back between two starts, or all times alike, as a copy of the study has them."""
    first = _task(tmp_path, "first", COUNT)
    third = _task(tmp_path, "third", COUNT, after=first.note)
    execute([first, third], tmp_path / "logs", lambda text: None)
    os.utime(first.note, ns=(ns, ns))
    assert third.is_done()
    changed = _task(tmp_path, "first", COUNT + "\n")
    execute([changed], tmp_path / "logs", lambda text: None)
    os.utime(first.note, ns=(ns, ns))
    assert not third.is_done()


def test_what_was_made_from_other_files_is_made_again(tmp_path: Path, python_tasks: None) -> None:
    pairs = tmp_path / "pairs"
    task = dataclasses.replace(_task(tmp_path, "one", COUNT), inputs=(pairs, tmp_path / "recipe"))
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


@pytest.mark.parametrize(
    ("folder", "root"), [("", "."), ("exp/", "exp"), ("my/exp/", "my/exp"), ("other/", "other")]
)
def test_notes_of_earlier_versions_with_paths_as_they_were_typed_are_believed(
    folder: str, root: str, tmp_path: Path
) -> None:
    """Started in the study's folder or above it; a folder that is not this one is another study's."""
    home = tmp_path / "my" / "exp"
    home.mkdir(parents=True)
    for name in ("recipe.yaml", "pairs.jsonl"):
        (home / name).write_text(name)

    def command(folder: str, root: str) -> tuple[str, ...]:
        settings = (f'data.train="{folder}pairs.jsonl"', f'data.image_root="{root}"')
        return ("fasttrain", "dpo", "-c", f"{folder}recipe.yaml", *(w for s in settings for w in ("-s", s)))

    task = Task(
        kind="train", subject="one", command=command(f"{home}/", str(home)), output=home, note=home / "one.json",
        inputs=(home / "recipe.yaml", home / "pairs.jsonl"), folder=home,
    )  # fmt: skip
    hashes = dict(zip((f"{folder}recipe.yaml", f"{folder}pairs.jsonl"), task.read().values(), strict=True))
    note = {"command": shlex.join(command(folder, root)), "inputs": hashes, "seconds": 1.0}
    task.note.write_text(json.dumps(note))
    assert task.is_done() == (root != "other")
    (home / "pairs.jsonl").write_text("others")
    assert not task.is_done()


@pytest.mark.parametrize(("output", "kept"), [("out", True), ("../out", False)])
def test_a_study_that_was_moved_keeps_what_is_done_and_the_time_of_what_was_stopped(
    output: str, kept: bool, study_file: Any, tmp_path: Path
) -> None:
    """With the folder that it lies in; notes outside may be those of a study in a folder of the earlier name."""
    for name in ("my exp", "é"):
        (tmp_path / name).mkdir()
    before, after = tmp_path / "my exp" / "a", tmp_path / "é" / "a's"
    study = study_file(output=output, models={"small": "./model", "big": "hub/big"})
    before.mkdir()
    for path in [*tmp_path.glob("*.jsonl"), *tmp_path.glob("*.yaml")]:
        path.rename(before / path.name)
    (before / "model").mkdir()
    first, *others, last = tasks_of(load_study(before / study.name))
    for task in (first, *others):
        for path in (task.output, task.note):
            path.parent.mkdir(parents=True, exist_ok=True)
        attempt = begin(task)
        task.output.touch()
        succeed(task, keep_time(task, attempt, 7.0), incomplete=False)
    keep_time(last, begin(last), 1000.0)
    assert [task.is_done() for task in (first, *others, last)] == [True] * (1 + len(others)) + [False]

    before.rename(after)
    if not kept:
        (before.parent / "out").rename(after.parent / "out")
    first, *others, last = tasks_of(load_study(after / study.name))
    # what names nothing in the folder is the same command wherever it lies
    assert {task.is_done() for task in (first, *others)} == {kept}
    assert begin(last).seconds == (1000.0 if kept else 0.0)
    (after / "recipe.yaml").write_text("train: {max_steps: 4}\n")
    assert not any(task.is_done() for task in others if task.kind == "train")


def test_a_refused_change_leaves_what_is_known_of_the_result(tmp_path: Path, python_tasks: None) -> None:
    """Another setting is refused and taken back: nothing is done anew, and time and cost stay."""
    one = _task(tmp_path, "one", COUNT)
    after = _task(tmp_path, "after", COUNT, after=one.note)
    execute([one, after], tmp_path / "logs", lambda text: None)
    note = one.note.read_text()
    for _ in range(2):
        refused = _task(tmp_path, "one", "raise SystemExit('refused')")
        with pytest.raises(UserError, match="refused"):
            execute([refused, after], tmp_path / "logs", lambda text: None)
        assert not refused.is_done()
    execute([one, after], tmp_path / "logs", lambda text: None)
    assert (one.output.read_text(), after.output.read_text(), one.note.read_text()) == ("x", "x", note)


def test_a_failed_change_that_left_another_result_is_not_taken_for_the_earlier_one(
    tmp_path: Path, python_tasks: None
) -> None:
    one = _task(tmp_path, "one", COUNT)
    execute([one], tmp_path / "logs", lambda text: None)
    os.utime(one.output, ns=(1, 1))  # whatever the file system's clock tells apart
    for code in (f"{COUNT}\nraise SystemExit('late')", "raise SystemExit('refused')"):
        with pytest.raises(UserError):
            execute([_task(tmp_path, "one", code)], tmp_path / "logs", lambda text: None)
    assert not one.is_done()
    execute([one], tmp_path / "logs", lambda text: None)
    assert one.is_done() and one.output.read_text() == "xxx"


def test_time_belongs_to_the_command_and_files_that_took_it(tmp_path: Path, python_tasks: None) -> None:
    """Attempts at one result add up, a study that is told to stop included; those at another one do not."""
    told = f"import os, signal\nif not pathlib.Path({str(tmp_path / 'go')!r}).exists():\n"
    task = _task(tmp_path, "one", f"{told}    os.kill(os.getppid(), signal.SIGTERM); signal.pause()\n{COUNT}")
    other = _task(tmp_path, "one", "raise SystemExit('no luck')")

    def seconds_so_far() -> float:
        return float(json.loads(task.tried.read_text())["seconds"])

    with pytest.raises(Terminated):
        execute([task], tmp_path / "logs", lambda text: None)
    assert seconds_so_far() > 0
    task.tried.write_text(json.dumps(json.loads(task.tried.read_text()) | {"seconds": 1000.0}))
    (tmp_path / "go").touch()
    execute([task], tmp_path / "logs", lambda text: None)
    assert task.seconds is not None and 1000 < task.seconds < 1100
    with pytest.raises(UserError):
        execute([other], tmp_path / "logs", lambda text: None)
    other.tried.write_text(json.dumps(json.loads(other.tried.read_text()) | {"seconds": 1000.0}))
    task.output.unlink()
    execute([task], tmp_path / "logs", lambda text: None)
    assert 0 < task.seconds < 100


def test_the_time_of_a_result_from_outside_the_study_is_not_known(tmp_path: Path, python_tasks: None) -> None:
    """As a scheduler leaves it: to go on with what is there takes next to nothing, and says nothing of its cost."""
    task = _task(tmp_path, "one", COUNT)
    task.output.write_text("x")
    assert task.seconds is None
    execute([task], tmp_path / "logs", lambda text: None)
    assert task.is_done() and task.seconds is None


def test_a_command_that_stopped_early_is_no_success(tmp_path: Path, python_tasks: None) -> None:
    """Training ends with code 0 after SIGTERM, without its adapter."""
    with pytest.raises(Terminated):
        execute([_task(tmp_path, "one", "pass")], tmp_path / "logs", lambda text: None)


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
from fasttrain.study.notes import Task
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
