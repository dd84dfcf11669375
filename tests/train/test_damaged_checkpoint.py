"""A checkpoint goes on only if every byte of it is what was written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError

FILES = ("weights.safetensors", "optimizer.safetensors", "random.safetensors")
DAMAGED = r"step-000002: the checkpoint is damaged .*delete that folder"


@pytest.fixture(scope="module")
def trained(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`trained(folder, steps)` trains to a step there; with `resume`, goes on to it."""
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    pairs = text_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 12)

    def train(folder: Path, steps: int, resume: bool = False) -> Any:
        raw = {
            "model": {"name": str(tiny_text)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(pairs), "workers": 0},
            "train": {"output": str(folder), "max_steps": steps, "pairs_per_step": 4, "tokens_per_pack": 400,
                      "gradient_checkpointing": False},
            "track": [],
        }  # fmt: skip
        return train_dpo(config_from_dict(raw), resume=resume)

    return train


@pytest.fixture(scope="module")
def two_steps(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(trained(tmp_path_factory.mktemp("run") / "run", 2).folder)


@pytest.fixture
def checkpoint(two_steps: Path, tmp_path: Path) -> Path:
    """The only checkpoint of a run of two steps, this test's own."""
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-000002"


def refused(trained: Any, checkpoint: Path, match: str = DAMAGED) -> None:
    with pytest.raises(UserError, match=match) as error:
        trained(checkpoint.parent.parent, 3, resume=True)
    assert len(str(error.value).splitlines()) == 1


def test_a_cut_file_is_named(checkpoint: Path, trained: Any) -> None:
    for name in FILES:
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:100])
        refused(trained, checkpoint)
        (checkpoint / name).write_bytes(whole)
    assert len(trained(checkpoint.parent.parent, 3, resume=True).metrics) == 3


def test_a_missing_state_is_no_older_checkpoint_and_no_beginning(checkpoint: Path, trained: Any) -> None:
    (checkpoint / "state.json").unlink()
    refused(trained, checkpoint, r"step-000002: the checkpoint is damaged \(state\.json is missing")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_no_other_number(checkpoint: Path, trained: Any, name: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-2] ^= 1  # within a tensor
    (checkpoint / name).write_bytes(content)
    refused(trained, checkpoint, rf"step-000002: the checkpoint is damaged \({name} .*delete that folder")


def test_a_pipe_or_device_in_a_files_place_is_not_read(checkpoint: Path, trained: Any) -> None:
    for name in FILES:
        whole = (checkpoint / name).rename(checkpoint / "whole")
        os.mkfifo(checkpoint / name)
        refused(trained, checkpoint, rf"the checkpoint is damaged \({name} is no file\)")
        whole.replace(checkpoint / name)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl", "pair_changes.jsonl"])
def test_a_pipe_in_the_run_folder_is_not_read(tmp_path: Path, name: str) -> None:
    from fasttrain.config import config_from_dict
    from fasttrain.train.run_folder import check_output

    os.mkfifo(tmp_path / name)
    raw = {"model": {"name": "x"}, "data": {"train": "y"}, "train": {"output": str(tmp_path)}}
    with pytest.raises(
        UserError, match=rf"^--resume: .*{name}: wanted a file, got a folder, pipe or device$"
    ):
        check_output(config_from_dict(raw), "dpo", resume=True, overwrite=False)


def test_a_state_without_what_every_checkpoint_has_is_damaged(checkpoint: Path, trained: Any) -> None:
    for held in ("{}", "[]", '{"step": 2}', '{"step": "2", "optimizer": {}}', "\xff", "[" * 100_000):
        (checkpoint / "state.json").write_bytes(held.encode("latin-1"))
        refused(trained, checkpoint)


def change_state(checkpoint: Path, **changes: Any) -> None:
    """Set entries of state.json; None takes one out."""
    state = json.loads((checkpoint / "state.json").read_text()) | changes
    kept = {name: value for name, value in state.items() if value is not None}
    (checkpoint / "state.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 1},
        {"files": []},
        {"files": {FILES[0]: "0" * 64}},
        {"inputs": 7},
        {"lines": []},
        {"lines": {"metrics.jsonl": "2"}},
    ],
)
def test_a_state_of_something_else_is_damaged(
    checkpoint: Path, trained: Any, changes: dict[str, Any]
) -> None:
    change_state(checkpoint, **changes)
    refused(trained, checkpoint)


def test_a_checkpoint_without_hashes_goes_on(checkpoint: Path, trained: Any) -> None:
    change_state(checkpoint, files=None)
    assert len(trained(checkpoint.parent.parent, 3, resume=True).metrics) == 3
