"""Image files that changed after their reference log-probs had been cached: the next run computes what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def run(tiny_llava: Path, tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:  # fmt: skip
    """Trains a step on a pair file that has an entry in the prepared cache; `.filled` is the fill's report."""
    from fasttrain.config import config_from_dict
    from fasttrain.data import prepared_cache
    from fasttrain.train import loop

    fill = loop.fill_references

    def noted(job: Any) -> Any:
        train.filled = fill(job)  # type: ignore[attr-defined]
        return train.filled  # type: ignore[attr-defined]

    def train(pairs: str) -> None:
        raw = {
            "model": {"name": str(tiny_llava)},
            "lora": {"rank": 2, "alpha": 4},
            "data": {"train": pairs, "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": 1, "pairs_per_step": 100, "tokens_per_pack": 4000},
            "track": [],
        }  # fmt: skip
        loop.train_dpo(config_from_dict(raw), overwrite=True)

    monkeypatch.setattr(prepared_cache, "SMALLEST", 1)
    monkeypatch.setattr(loop, "fill_references", noted)
    return train


def _redraw(folder: Path, tiny_models: ModuleType) -> None:
    """Other pictures under the same names."""
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        tiny_models.draw_image(path, seed=77 + number)


def test_an_image_changed_in_place_gets_references_of_its_own(
    run: Any, vision_pairs: Callable[..., Path], tmp_path: Path, tiny_models: ModuleType
) -> None:
    pairs = str(vision_pairs(tmp_path / "data", 8, images=(1, 0)))
    run(pairs)
    everything = run.filled.computed
    run(pairs)
    assert run.filled.computed == 0 < everything == run.filled.completions
    _redraw(tmp_path / "data", tiny_models)
    run(pairs)
    assert 0 < run.filled.computed < everything  # those without images stay
    os.utime(tmp_path / "data" / "images" / "0.png", (1, 1))  # the same picture
    run(pairs)
    assert run.filled.computed == 0


def test_equal_pair_files_beside_other_images_get_references_of_their_own(
    run: Any, vision_pairs: Callable[..., Path], tmp_path: Path, tiny_models: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    vision_pairs(tmp_path / "first", 8, images=(1,))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    _redraw(tmp_path / "second", tiny_models)
    for folder in ("first", "second"):
        monkeypatch.chdir(tmp_path / folder)
        run("pairs.jsonl")
        assert run.filled.computed == run.filled.completions
