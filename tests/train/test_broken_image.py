"""Images that are broken in their body are left out before training; one that breaks later stops the run, not in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain.errors import UserError


@pytest.mark.parametrize("budget", [40, 4000])
@pytest.mark.parametrize("where", ["train", "eval"])
def test_an_image_that_breaks_between_fill_and_training_is_an_error(
    tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    budget: int, where: str,
) -> None:  # fmt: skip
    import fasttrain.train.loop as loop
    from fasttrain.config import config_from_dict

    pairs = {name: vision_pairs(tmp_path / name, 8, seed=seed) for seed, name in enumerate(["train", "eval"])}
    fill = loop.fill_references

    def fill_then_break(job: loop.Job) -> loop.FillReport:
        report = fill(job)
        for image in sorted((tmp_path / where / "images").iterdir()):
            image.write_bytes(b"junk")
        return report

    monkeypatch.setattr(loop, "fill_references", fill_then_break)
    raw = {
        "model": {"name": str(tiny_llava)},
        "lora": {"rank": 2},
        "data": {"train": str(pairs["train"]), "eval": str(pairs["eval"]), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "max_steps": 1, "pairs_per_step": 100, "tokens_per_pack": budget},
        "track": [],
    }  # fmt: skip
    with pytest.raises(
        UserError, match=rf"{where}/pairs.jsonl line \d+: images: wanted an image, got .*png: not a"
    ):
        loop.train_dpo(config_from_dict(raw))


def cut(folder: Path, *names: str) -> None:
    """Cut image files in their body: their headers can still be read."""
    for path in [folder / "images" / name for name in names] or sorted((folder / "images").iterdir()):
        path.write_bytes(path.read_bytes()[:-60])


@pytest.fixture
def config(
    tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path, fresh_cache: Path
) -> Callable[..., Any]:
    """A recipe that skips bad rows: 8 pairs to train on, 3 to evaluate, with 6 and 2 image files, in folders by these names."""
    from fasttrain.config import config_from_dict

    train = vision_pairs(tmp_path / "train", 8, per_prompt=(1, 2), images=(1,))
    evaluation = vision_pairs(tmp_path / "eval", 3, per_prompt=(1, 2), images=(1,), seed=1)

    def make(*settings: str) -> Any:
        raw = {
            "model": {"name": str(tiny_llava)},
            "lora": {"rank": 2},
            "data": {"train": str(train), "eval": str(evaluation), "on_bad_row": "skip", "workers": 0},
            "train": {"output": str(tmp_path / "run"), "epochs": 2, "pairs_per_step": 3, "tokens_per_pack": 4000,
                      "schedule": "constant", "warmup_ratio": 0.0},
            "track": [],
        }  # fmt: skip
        return config_from_dict(raw, settings)

    return make


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_broken_images_are_left_out_before_training(
    method: str, config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a run goes on, and with nothing else to compute; by several processes in `sft`."""
    from fasttrain import train_dpo, train_sft
    from fasttrain.train import open_images

    monkeypatch.setattr(open_images, "_SEVERAL", 1 if method == "sft" else 1000)
    monkeypatch.setattr(open_images, "_CHUNK", 2)
    train = {"dpo": train_dpo, "sft": train_sft}[method]
    cut(tmp_path / "train", "1.png", "4.png")  # 2 pairs and 1
    cut(tmp_path / "eval", "0.png")
    whole = train(config(f"train.output={tmp_path / 'whole'}"))
    assert sum(line["pairs" if method == "dpo" else "examples"] for line in whole.metrics) == 2 * 5
    train(config("train.max_steps=1"))
    parts = train(config(), resume=True)
    assert [line["loss"] for line in parts.metrics] == [line["loss"] for line in whole.metrics]
    entries = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [(Path(entry["where"]).parent.name, entry["where"].rsplit()[-1]) for entry in entries] == [
        ("train", "2"), ("train", "7"), ("eval", "1"),
    ]  # fmt: skip
    assert all("png: broken image" in entry["reason"] for entry in entries)


def test_a_broken_image_of_the_group_that_shows_whether_prompts_can_be_shared_is_left_out(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain import train_dpo
    from fasttrain.train import first_step

    monkeypatch.setattr(first_step, "VERIFIED", set())
    cut(tmp_path / "train", *(f"{number}.png" for number in range(5)))  # of all groups but one
    (step, _) = train_dpo(config()).metrics
    assert step["pairs"] == 1


@pytest.mark.parametrize("where", ["train", "eval"])
@pytest.mark.parametrize("method", ["dpo", "sft", "dry run"])
def test_data_of_broken_images_only_are_the_users_mistake(
    method: str, where: str, config: Callable[..., Any], tmp_path: Path
) -> None:
    from fasttrain import train_dpo, train_sft
    from fasttrain.train.dry_run import dry_run
    from fasttrain.train.losses import PairLoss

    cut(tmp_path / where)
    with pytest.raises(
        UserError, match=rf"^data.{where}: wanted at least one usable pair, got none"
    ) as error:
        if method == "dry run":
            dry_run(config(), PairLoss(config().loss), resume=False, overwrite=False)
        else:
            {"dpo": train_dpo, "sft": train_sft}[method](config())
    assert "png: broken image" in str(error.value)


def test_a_short_run_opens_the_images_of_its_steps_only(
    config: Callable[..., Any], tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fasttrain import train_sft
    from fasttrain.train import open_images

    pairs = vision_pairs(tmp_path / "many", 40, per_prompt=(1,), images=(1,))
    opened: list[int] = []
    problem = open_images._problem

    def noted(data: Any, number: int) -> str | None:
        opened.append(number)
        return problem(data, number)

    def run() -> Any:
        opened.clear()
        settings = ("train.max_steps=3", "train.pairs_per_step=1", "data.eval=null", "train.seed=5")
        return train_sft(config(f"data.train={pairs}", *settings), overwrite=True)

    monkeypatch.setattr(open_images, "_problem", noted)
    assert len(run().metrics) == len(opened) == 3
    cut(tmp_path / "many", f"{opened[1]}.png")
    first = list(opened)
    assert len(run().metrics) == 3
    assert len(opened) == 4 and set(first) < set(opened)  # another one in its place


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_image_of_which_the_processor_leaves_nothing_is_a_bad_row(
    tiny_families: ModuleType, tiny_models: ModuleType, vision_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """Pixtral's scales a strip down until no patch is left of its height."""
    from PIL import Image

    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    pairs = vision_pairs(tmp_path / "data", 4, per_prompt=(1, 1), images=(1,))
    Image.new("RGB", (150, 1)).save(tmp_path / "data" / "images" / "0.png")
    raw = {
        "model": {"name": str(tiny_families.save(tiny_models, tmp_path / "model", "Pixtral"))},
        "lora": {"rank": 2},
        "data": {"train": str(pairs), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "max_steps": 1, "pairs_per_step": 3},
        "track": [],
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"line 1: images: wanted images that .* processor takes, got 150 x 1"
    ):
        train_dpo(config_from_dict(raw))
    (step,) = train_dpo(config_from_dict(raw, ["data.on_bad_row=skip"])).metrics
    assert step["pairs"] == 3
    assert "150 x 1 pixels" in (tmp_path / "run" / "skipped.jsonl").read_text()
