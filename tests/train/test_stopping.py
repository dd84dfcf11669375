"""SIGTERM belongs to the checkpoint, evaluation holds no images, and the newest checkpoint is the one with most steps."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Any]:
    def run(model: Path, pairs: Path, *settings: str, **how: bool) -> Any:
        from fasttrain import train_dpo
        from fasttrain.config import config_from_dict

        raw = {
            "model": {"name": str(model)},
            "lora": {"rank": 2},
            "data": {"train": str(pairs), "eval": str(pairs), "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": 4, "pairs_per_step": 6, "tokens_per_pack": 100},
            "track": [],
        }  # fmt: skip
        return train_dpo(config_from_dict(raw, settings), **how)

    return run


def send_in_step(number: int, which: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process get a signal at the beginning of a step."""
    from fasttrain.train import loop

    run = loop.StepRunner.run

    def interrupted(self: Any, step: Any, *rest: Any, **options: Any) -> Any:
        if step.number == number:
            os.kill(os.getpid(), which)
        return run(self, step, *rest, **options)

    monkeypatch.setattr(loop.StepRunner, "run", interrupted)


def test_sigterm_within_a_step_saves_without_evaluating(
    tiny_text: Path, text_pairs: Callable[..., Path], train: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    send_in_step(2, signal.SIGTERM, monkeypatch)
    pairs = text_pairs(tmp_path / "pairs.jsonl", 18)
    result = train(tiny_text, pairs)
    assert [line["step"] for line in result.metrics] == [1, 2]
    assert not any("eval_loss" in line for line in result.metrics)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    monkeypatch.undo()
    assert "eval_loss" in train(tiny_text, pairs, resume=True).metrics[-1]


@pytest.mark.parametrize(
    ("every", "said"),
    [("null", "; there is no checkpoint yet"), ("1", "; the checkpoint step-000002 is kept, go on from it")],
)
def test_ctrl_c_says_which_steps_are_kept(
    every: str, said: str, tiny_text: Path, text_pairs: Callable[..., Path], train: Callable[..., Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    send_in_step(3, signal.SIGINT, monkeypatch)
    pairs = text_pairs(tmp_path / "pairs.jsonl", 18)
    # a shell's background jobs ignore it, and what they start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match=f"^{said}"):
            train(tiny_text, pairs, f"train.checkpoint_every={every}")
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_within_an_evaluation_ends_it_and_saves_the_step(
    tiny_text: Path, text_pairs: Callable[..., Path], train: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fasttrain.train import engine

    forward = engine.TorchEngine.forward
    evaluated = []

    def interrupted(self: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        if not self.policy.training:
            evaluated.append(batch)
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, *rest, **options)

    monkeypatch.setattr(engine.TorchEngine, "forward", interrupted)
    result = train(tiny_text, text_pairs(tmp_path / "pairs.jsonl", 18), "train.eval_every=2")
    assert len(evaluated) == 1
    assert [line["step"] for line in result.metrics] == [1, 2]
    assert not any("eval_loss" in line for line in result.metrics)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


def test_evaluation_keeps_no_images_of_the_packs_that_are_done(
    tiny_llava: Path, vision_pairs: Callable[..., Path], train: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fasttrain.train import step

    across = step.pairs_across
    held: list[Any] = []

    def record(logp_N: Any, packs: Any, *rest: Any) -> Any:
        held.extend(batch.inputs for batch, _ in packs)
        return across(logp_N, packs, *rest)

    monkeypatch.setattr(step, "pairs_across", record)
    train(tiny_llava, vision_pairs(tmp_path / "data", 8), "train.tokens_per_pack=1000", "train.max_steps=1")
    assert held and all(inputs == [] for inputs in held)


def test_checkpoints_are_ordered_by_step_beyond_a_million(tmp_path: Path) -> None:
    from fasttrain.train.checkpoint import checkpoint_name, latest_checkpoint, list_checkpoints

    for number in (1_000_000, 50, 999_950):
        (tmp_path / checkpoint_name(number)).mkdir()
        (tmp_path / checkpoint_name(number) / "state.json").write_text("{}")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-000050",
        "step-999950",
        "step-1000000",
    ]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-1000000"


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on NFS while somebody reads it: its folder is not empty until that file is closed."""
    from fasttrain.train.checkpoint import checkpoint_name, delete_old, latest_checkpoint

    for number in (1, 2, 3):
        (tmp_path / checkpoint_name(number)).mkdir()
        (tmp_path / checkpoint_name(number) / "state.json").write_text("{}")
    rmdir = os.rmdir

    def busy(name: Any, **where: Any) -> None:
        if "step-000001" in str(name):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(name))
        rmdir(name, **where)

    monkeypatch.setattr(os, "rmdir", busy)
    delete_old(tmp_path, 1)
    warning = f"warning: {tmp_path}/step-000001: cannot delete this old checkpoint: Directory not empty\n"
    assert capsys.readouterr().err == warning
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000003"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
