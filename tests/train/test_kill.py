"""A run that is killed at any instant, in the fill or in training, goes on to the numbers of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.forks
TIMINGS = {
    "step_s", "data_s", "forward_s", "backward_s", "update_s", "pairs_per_s", "tokens_per_s", "tflops", "mfu", "peak_bytes",
}  # fmt: skip
KILLS = 20


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock or the memory allocator decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


class Run:
    """A recipe with dropout, evaluation and checkpoints, run in forked children of this process."""

    def __init__(self, model: Path, pairs: Path, folder: Path) -> None:
        self.model, self.pairs, self.folder = model, pairs, folder

    def start(self) -> int:
        """Begin or resume in a child; its process id."""
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            os.environ["FASTTRAIN_CACHE"] = str(self.folder / "cache")
            sys.stdout = sys.stderr = (self.folder / "log.txt").open("a", buffering=1)
            self._train()
            os._exit(0)
        except BaseException:  # noqa: BLE001 (a forked child must not return into pytest)
            import traceback

            traceback.print_exc()
            os._exit(1)

    def _train(self) -> None:
        from fasttrain import train_dpo
        from fasttrain.config import config_from_dict

        raw = {
            "model": {"name": str(self.model)},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": str(self.pairs), "eval": str(self.pairs), "workers": 1},
            "train": {
                "output": str(self.folder / "run"), "epochs": 4, "pairs_per_step": 4, "learning_rate": 1e-3,
                "tokens_per_pack": 100, "checkpoint_every": 3, "eval_every": 5,
            },
            "track": [],
        }  # fmt: skip
        train_dpo(config_from_dict(raw), resume=True)

    def wait(self, pid: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_killed_runs_give_the_metrics_of_an_undisturbed_run(
    tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    import fasttrain.train.loop  # noqa: F401 (imported here once, so that children start at once)

    data = tmp_path / "data"
    data.mkdir()
    pairs = vision_pairs(data, 24)
    calm = tmp_path / "calm"
    calm.mkdir()
    run = Run(tiny_llava, pairs, calm)
    start = time.monotonic()
    assert run.wait(run.start()) == 0, (calm / "log.txt").read_text()
    duration = time.monotonic() - start
    truth = numbers(calm / "run")
    assert len(truth) > 15 and "eval_loss" in truth[4]

    rng = random.Random(0)
    kills = attempt = resumed = 0
    while kills < KILLS:
        attempt += 1
        folder = tmp_path / f"attempt-{attempt}"
        folder.mkdir()
        run = Run(tiny_llava, pairs, folder)
        while True:
            pid = run.start()
            # instants spread over loading, filling and training, whatever this machine's speed
            time.sleep(rng.uniform(0.1, 1.0) * duration if kills < KILLS else 0)
            ended, _ = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            if kills >= KILLS:
                assert run.wait(pid) == 0, (folder / "log.txt").read_text()
                break
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        resumed += (folder / "log.txt").read_text().count("resumed from")
        assert numbers(folder / "run") == truth, (folder / "log.txt").read_text()
        moved = [f / "run" / "pair_changes.jsonl" for f in (calm, folder)]
        assert moved[0].read_bytes() == moved[1].read_bytes() and moved[0].stat().st_size > 2000
        weights = [f / "run" / "final" / "adapter_model.safetensors" for f in (calm, folder)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert kills == KILLS and resumed >= 3


def test_sigterm_finishes_the_step_saves_and_exits_0(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    import fasttrain.train.loop  # noqa: F401

    pairs = text_pairs(tmp_path / "pairs.jsonl", 24)
    run = Run(tiny_text, pairs, tmp_path)
    pid = run.start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert run.wait(pid) == 0
    stopped_at = numbers(tmp_path / "run")[-1]["step"]
    log = (tmp_path / "log.txt").read_text()
    assert f"stopped by SIGTERM after step {stopped_at}" in log
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped_at:06d}" / "state.json").exists()
    assert not (tmp_path / "run" / "final").exists()
    assert run.wait(run.start()) == 0
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()
    assert [line["step"] for line in numbers(tmp_path / "run")] == list(
        range(1, numbers(tmp_path / "run")[-1]["step"] + 1)
    )
