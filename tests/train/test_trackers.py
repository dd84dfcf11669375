"""Trackers are told every line, and none of them can stop a run."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain.train.run_log import RunLog
from fasttrain.train.trackers import Trackers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_every_number_of_every_line(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], tmp_path, {}, 1)
    for step in (1, 2, 3):
        trackers.log({"step": step, "loss": 0.5 / step, "rewards/margins": float(step)}, step)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "rewards/margins"}
    assert [(e.step, e.value) for e in events.Scalars("rewards/margins")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_config_lines_and_an_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    module = ModuleType(name)
    module.init = lambda **options: calls.append(("init", options))  # type: ignore[attr-defined]
    module.log = lambda line, step: calls.append(("log", (line, step)))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    trackers = Trackers([name], tmp_path / "run", {"beta": 0.1}, 1)
    trackers.log({"step": 4, "loss": 0.5}, 4)
    trackers.close()
    assert [kind for kind, _ in calls] == ["init", "log", "finish"]
    assert calls[0][1]["config"] == {"beta": 0.1} and calls[0][1]["name"] == "run"
    assert calls[1][1] == ({"loss": 0.5}, 4)


def test_a_missing_tracker_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = Trackers(["wandb"], tmp_path, {}, 1)
    trackers.log({"step": 1, "loss": 0.5}, 1)
    trackers.close()
    assert capsys.readouterr().err == "fasttrain: wandb is not installed, not tracked (pip install wandb)\n"


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("server gone")

    lines: list[Any] = []
    for name, log in (("wandb", fail), ("trackio", lambda line, step: lines.append(step))):
        module = ModuleType(name)
        module.init = module.finish = lambda **options: None  # type: ignore[attr-defined]
        module.log = log  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    trackers = Trackers(["wandb", "trackio"], tmp_path, {}, 1)
    for step in (1, 2):
        trackers.log({"step": step, "loss": 0.5}, step)
    trackers.close()
    assert lines == [1, 2]
    assert capsys.readouterr().err == "fasttrain: wandb failed, no longer tracked: server gone\n"


@pytest.mark.parametrize("lines", [1, 20])
def test_a_full_disk_under_tensorboard_is_one_line(
    lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file is written by a thread of its own, whose failure may come with a line's or not before the end."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    hook = threading.excepthook
    trackers = Trackers(["tensorboard"], tmp_path, {}, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(lines):
        trackers.log({"step": step, "loss": 0.5}, step)
    trackers.close()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("fasttrain: tensorboard failed")
    assert "No space left on device" in told[0] and threading.excepthook is hook


def test_trackers_are_closed_though_the_disk_has_no_room_for_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hook = threading.excepthook
    log = RunLog(tmp_path, {"track": []}, 0, main=True, changes=False)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        log.close()
    assert threading.excepthook is hook
    monkeypatch.undo()
    log.close()
