"""SIGKILL before every single change that a run makes to its folder, not at random moments."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.forks
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate"}


def killed_at(point: int, under: Path, work: Callable[[], object], log: Path) -> bool:
    """Do the work in a child that dies before its `point`-th change under a folder; False if it came to its end first."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), log.read_text()
        return code != 0
    try:
        left = point

        def before(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in CHANGES:
                place, folder = str(arguments[0]), arguments[-1] if event in ("os.remove", "os.rmdir") else -1
                if isinstance(folder, int) and folder >= 0:  # rmtree names files by their folder's descriptor
                    place = str(Path(f"/proc/self/fd/{folder}").readlink() / place)
                if place.startswith(str(under)):
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.stdout = sys.stderr = log.open("a", buffering=1)
        sys.addaudithook(before)
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001 (a forked child must not return into pytest)
        import traceback

        traceback.print_exc()
        os._exit(1)


def recipe(model: Path, pairs: Path, folder: Path, **train: Any) -> Any:
    from fasttrain.config import config_from_dict

    settings = {
        "output": str(folder), "max_steps": 4, "pairs_per_step": 2, "checkpoint_every": 1, "keep_checkpoints": 1,
    }  # fmt: skip
    raw = {
        "model": {"name": str(model)},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "data": {"train": str(pairs), "workers": 0},
        "train": settings | train,
        "track": [],
    }
    return config_from_dict(raw)


def test_a_kill_amid_overwriting_leaves_no_checkpoint_without_its_recipe(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """Without config.yaml `--resume` takes any recipe: a new one would go on from the old run's weights."""
    from fasttrain.train.checkpoint import list_checkpoints
    from fasttrain.train.run_folder import open_run_folder
    from fasttrain.train.run_lock import RunLock

    pairs = text_pairs(tmp_path / "pairs.jsonl", 4)
    run = tmp_path / "run"
    old, new = (recipe(tiny_text, pairs, run, learning_rate=rate) for rate in (1e-3, 1e-4))
    point, killed = 0, True
    while killed:
        point += 1
        step = run / "checkpoints" / "step-000004"
        step.mkdir(parents=True, exist_ok=True)
        names = ("state.json", "weights.safetensors")
        for file in [run / "metrics.jsonl", *(step / name for name in names)]:
            file.write_text("{}")
        (run / "config.yaml").write_text(old.to_yaml())
        killed = killed_at(
            point,
            run,
            lambda: open_run_folder(new, "dpo", RunLock(), resume=False, overwrite=True),
            tmp_path / "log.txt",
        )
        for found in list_checkpoints(run / "checkpoints"):
            assert (run / "config.yaml").read_text() == old.to_yaml(), point
            assert (found / "weights.safetensors").is_file(), point
    assert point > 4 and (run / "config.yaml").read_text() == new.to_yaml()


def test_a_kill_amid_deleting_an_old_checkpoint_leaves_no_part_of_it_for_ever(tmp_path: Path) -> None:
    from fasttrain.files import delete_whole, remove_leftovers

    step = tmp_path / "checkpoints" / "step-000004"
    point, killed = 0, True
    while killed:
        point += 1
        step.mkdir(parents=True, exist_ok=True)
        names = {"optimizer.safetensors", "state.json", "weights.safetensors"}
        for name in names:
            (step / name).write_text("{}")
        killed = killed_at(point, step.parent, lambda: delete_whole(step), tmp_path / "log.txt")
        remove_leftovers(step.parent)
        assert not step.exists() or {path.name for path in step.iterdir()} == names, point
    assert point > 3 and not list(step.parent.iterdir())
