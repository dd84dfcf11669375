"""Image files that changed after their reference log-probs had been cached: a new run computes what is missing, one that goes
on is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain.errors import UserError


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


@pytest.fixture
def goes_on(
    tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path, fresh_cache: Path
) -> Callable[[int], Any]:
    """`goes_on(steps)` resumes a run of one step over 12 pairs, whose bad rows are left out, with a copy of the model."""
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    shutil.copytree(tiny_llava, tmp_path / "model")
    pairs = vision_pairs(tmp_path / "data", 12, per_prompt=(1,), images=(1, 0))

    def train(steps: int) -> Any:
        raw = {
            "model": {"name": str(tmp_path / "model")},
            "lora": {"rank": 2},
            "data": {"train": str(pairs), "on_bad_row": "skip", "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": steps, "pairs_per_step": 4, "tokens_per_pack": 4000},
            "track": [],
        }  # fmt: skip
        return train_dpo(config_from_dict(raw), resume=True)

    train(1)
    return train


def _redrawn(folder: Path, tiny_models: ModuleType) -> str:
    tiny_models.draw_image(folder / "data" / "images" / "3.png", seed=99)
    return "the images of data.train"


def _deleted(folder: Path, tiny_models: ModuleType) -> str:
    (folder / "data" / "images" / "3.png").unlink()
    return "the usable rows of data.train"


def _processed_otherwise(folder: Path, tiny_models: ModuleType) -> str:
    (path,) = (path for path in (folder / "model").glob("*.json") if "image_mean" in path.read_text())
    settings = json.loads(path.read_text())
    settings.get("image_processor", settings)["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(settings))
    return "the image processor of model.name"


@pytest.mark.parametrize("change", [_redrawn, _deleted, _processed_otherwise])
def test_a_run_over_changed_pictures_is_refused_by_name(
    change: Callable[..., str], goes_on: Callable[[int], Any], tmp_path: Path, tiny_models: ModuleType
) -> None:
    name = change(tmp_path, tiny_models)
    with pytest.raises(UserError, match=f"^--resume: changed since .* was written: .*{name}"):
        goes_on(2)


def test_touched_pictures_go_on_and_one_more_that_is_left_out_does_not(
    goes_on: Callable[[int], Any], tmp_path: Path
) -> None:
    image = tmp_path / "data" / "images" / "3.png"
    image.touch()
    assert len(goes_on(2).metrics) == 2
    image.write_bytes(image.read_bytes()[:-60])  # its header can still be read
    with pytest.raises(UserError, match=r"^--resume: changed since .* the images of data\.train"):
        goes_on(3)


def test_of_many_groups_the_images_of_some_are_read(
    goes_on: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No start may read a million files for a digest."""
    from fasttrain.data.prepared import PreparedData
    from fasttrain.train import inputs

    seen: list[Any] = []
    hashed = inputs.image_hash
    monkeypatch.setattr(inputs, "image_hash", lambda ref, memo: seen.append(ref) or hashed(ref, memo))
    monkeypatch.setattr(PreparedData, "some_groups", lambda self: [0, 1, 2])
    with pytest.raises(UserError, match="the images"):  # it was begun with all of them
        goes_on(2)
    assert len(seen) == 2
