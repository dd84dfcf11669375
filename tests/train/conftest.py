"""A short run of a tiny model, and pairs for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Runner = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    def train(model: Path, pairs: Path, *overrides: str, output: str = "run", resume: bool = False) -> Any:
        from fasttrain import train_dpo
        from fasttrain.config import config_from_dict

        raw = {
            "model": {"name": str(model)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(pairs), "workers": 0},
            "train": {
                "output": str(tmp_path / output), "max_steps": 4, "pairs_per_step": 6, "learning_rate": 5e-3,
                "tokens_per_pack": 400, "warmup_ratio": 0.0, "schedule": "constant",
            },
            "track": [],
        }  # fmt: skip
        return train_dpo(config_from_dict(raw, overrides), overwrite=not resume, resume=resume)

    return train


@pytest.fixture
def text(text_pairs: Callable[..., Path], tmp_path: Path) -> Path:
    return text_pairs(tmp_path / "pairs.jsonl", 18)


@pytest.fixture
def vision(vision_pairs: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "vision"
    folder.mkdir()
    return vision_pairs(folder, 12)
