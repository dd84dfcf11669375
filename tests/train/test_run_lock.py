"""One run at a time in a run folder, and none deleted by flags that contradict each other."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttrain import train_dpo
from fasttrain.config import DPOConfig, config_from_dict
from fasttrain.errors import UserError
from fasttrain.train.run_folder import open_run_folder
from fasttrain.train.run_lock import RunLock


@pytest.fixture
def recipe(tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path) -> Callable[..., DPOConfig]:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 12)

    def make(*overrides: str) -> DPOConfig:
        raw = {
            "model": {"name": str(tiny_text)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(pairs), "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": 2, "pairs_per_step": 6, "learning_rate": 5e-3,
                      "tokens_per_pack": 400, "warmup_ratio": 0.0, "checkpoint_every": 1},
            "track": [],
        }  # fmt: skip
        return config_from_dict(raw, overrides)

    return make


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_in_which_a_run_is_going_on_is_refused(
    recipe: Callable[..., DPOConfig], tmp_path: Path, how: dict[str, bool]
) -> None:
    train_dpo(recipe())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with contextlib.closing(RunLock()) as other:
        other.take(tmp_path / "run")
        with pytest.raises(UserError, match="another run is going on in"):
            train_dpo(recipe(), **how)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    train_dpo(recipe("train.max_steps=3"), resume=True)


def test_a_run_that_began_while_this_one_loaded_is_not_mixed_with_it(
    recipe: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    with contextlib.closing(RunLock()) as other:
        (tmp_path / "run").mkdir()
        other.take(tmp_path / "run")
        with pytest.raises(UserError, match="another run is going on in"):
            open_run_folder(recipe(), "dpo", RunLock(), resume=False, overwrite=False)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with (
        contextlib.closing(RunLock()) as lock,
        pytest.raises(UserError, match="run is in use; --resume goes on with it"),
    ):
        open_run_folder(recipe(), "dpo", lock, resume=False, overwrite=False)


@pytest.mark.forks
def test_a_worker_that_outlives_its_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    lock = RunLock()
    lock.take(tmp_path)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writing, b"!")
        signal.pause()
        os._exit(0)
    try:
        assert os.read(reading, 1) == b"!"  # the child is past its hooks
        lock.close()
        with contextlib.closing(RunLock()) as next_run:
            next_run.take(tmp_path)
            with pytest.raises(UserError):
                RunLock().take(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


def test_resume_and_overwrite_together_are_refused(recipe: Callable[..., DPOConfig], tmp_path: Path) -> None:
    train_dpo(recipe())
    with pytest.raises(UserError, match="--resume and --overwrite: wanted one of them, got both"):
        train_dpo(recipe(), resume=True, overwrite=True)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
