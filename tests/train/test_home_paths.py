"""Every path of a recipe may start at `~`; the recipe that is kept says what the user wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fasttrain.config import config_from_dict
from fasttrain.errors import UserError
from fasttrain.files import user_path
from fasttrain.train import loop


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_a_run_starts_from_and_writes_to_folders_at_home(
    home: Path, tiny_text: Path, tiny_models: Any, text_pairs: Callable[..., Path]
) -> None:
    tiny_models.build_adapter(tiny_text, home / "adapter", b_std=0.1)
    text_pairs(home / "pairs.jsonl", 4)
    (home / "model").symlink_to(tiny_text)
    raw: dict[str, Any] = {
        "model": {"name": "~/model"},
        "lora": {"init_from": "~/adapter"},
        "data": {"train": "~/pairs.jsonl", "workers": 0},
        "train": {"output": "~/runs/a", "max_steps": 1, "pairs_per_step": 2, "checkpoint_every": 1},
        "track": [],
    }
    run = loop.train_dpo(config_from_dict(raw))
    assert run.folder == home / "runs" / "a" and run.adapter.is_dir()
    kept = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (kept["train"]["output"], kept["lora"]["init_from"]) == ("~/runs/a", "~/adapter")
    with pytest.raises(UserError, match="is in use"):
        loop.train_dpo(config_from_dict(raw))
    raw["train"]["max_steps"] = 2
    assert len(loop.train_dpo(config_from_dict(raw), resume=True).metrics) == 2
    assert not list(Path().iterdir())


def test_settings_of_deepspeed_and_benchmark_folders_may_be_at_home(home: Path) -> None:
    from fasttrain.train.deepspeed_settings import deepspeed_settings
    from fasttrain.train.watch import split_eval

    (home / "zero.json").write_text('{"wall_clock_breakdown": true}')
    raw = {
        "model": {"name": "x"},
        "data": {"train": "x"},
        "distributed": {"zero_stage": 2, "deepspeed_config": "~/zero.json"},
    }
    assert deepspeed_settings(config_from_dict(raw), torch.float32)["wall_clock_breakdown"] is True
    (home / "pope").mkdir()
    (home / "pope" / "coco_pope_random.json").write_text("")
    assert split_eval(["~/pairs.jsonl", "~/pope"]) == (["~/pairs.jsonl"], [home / "pope"])


def test_plan_reads_the_adapter_and_the_pairs_at_home(
    home: Path, tiny_text: Path, tiny_models: Any, text_pairs: Callable[..., Path]
) -> None:
    from click.testing import CliRunner

    from fasttrain.cli import cli

    tiny_models.build_adapter(tiny_text, home / "adapter")
    text_pairs(home / "pairs.jsonl", 4)
    recipe = {
        "model": {"name": str(tiny_text)},
        "lora": {"init_from": "~/adapter"},
        "data": {"train": "~/pairs.jsonl"},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    shown = CliRunner().invoke(cli, ["plan", "-c", "recipe.yaml"])
    assert shown.exception is None and "typical lengths" not in shown.stdout


def test_a_home_that_is_not_known_leaves_the_path_as_it_is_written() -> None:
    assert user_path("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
