"""Numbers that are not finite: a run stops with a line, and neither cache nor checkpoints keep what is spoiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.errors import UserError


@pytest.fixture
def train(text_pairs: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 12)

    def run(model: Path, *settings: str) -> Any:
        from fasttrain import train_dpo
        from fasttrain.config import config_from_dict

        raw = {
            "model": {"name": str(model)},
            "lora": None,
            "data": {"train": str(pairs), "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": 4, "pairs_per_step": 6, "warmup_ratio": 0.0},
            "track": [],
        }  # fmt: skip
        return train_dpo(config_from_dict(raw, settings), overwrite=True)

    return run


def save_with_nan(model: Path, folder: Path, tensor: str, row: int) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[tensor][row] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_diverged_run_stops_and_keeps_the_last_sound_checkpoint(
    tiny_text: Path, train: Callable[..., Any], tmp_path: Path
) -> None:
    wild = ["train.learning_rate=1e30", "train.checkpoint_every=1"]
    with pytest.raises(UserError, match=r"step 2: training has diverged \(sum of losses nan"):
        train(tiny_text, *wild)
    with pytest.raises(UserError, match=r"step 2: training has diverged"):
        train(tiny_text, *wild, "train.log_every=4")  # a checkpoint is checked where no line is written
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert not (tmp_path / "run" / "final").exists()


def test_a_gradient_that_was_not_finite_is_told_at_the_next_line(
    tiny_text: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed leaves such an update out and goes on."""
    from fasttrain.train.engine import TorchEngine

    step, steps = TorchEngine.step, 0

    def skipped(self: TorchEngine, factor: float) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return torch.tensor(torch.inf) if steps == 2 else step(self, factor)

    monkeypatch.setattr(TorchEngine, "step", skipped)
    with pytest.raises(UserError, match=r"step 4: training has diverged .* gradient norm inf"):
        train(tiny_text, "train.log_every=4")


def test_the_metrics_of_a_diverged_run_are_json(
    tiny_text: Path, train: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="diverged"):
        train(tiny_text, "train.learning_rate=1e30")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [1]


def test_weights_that_are_not_finite_are_named_as_such(
    tiny_text: Path, train: Callable[..., Any], tmp_path: Path
) -> None:
    broken = save_with_nan(tiny_text, tmp_path / "broken", "model.layers.1.mlp.up_proj.weight", 3)
    with pytest.raises(UserError, match="the logits of LlamaForCausalLM are not finite"):
        train(broken)


def test_a_reference_that_is_not_finite_is_not_cached(
    tiny_text: Path, train: Callable[..., Any], tmp_path: Path, fresh_cache: Path
) -> None:
    import sqlite3

    from transformers import AutoTokenizer

    # a token of the chat template that the check of the head does not use
    token = AutoTokenizer.from_pretrained(tiny_text).convert_tokens_to_ids("?")
    broken = save_with_nan(tiny_text, tmp_path / "broken", "model.embed_tokens.weight", token)
    with pytest.raises(UserError, match=r"log-prob of nan for an answer of .*pairs.jsonl line 1"):
        train(broken)
    (file,) = (fresh_cache / "reference").glob("*.sqlite")
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT COUNT(*) FROM logps").fetchone() == (0,)
    database.close()
