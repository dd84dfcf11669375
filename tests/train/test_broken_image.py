"""An image that breaks after its reference was computed stops the run; no pair is left out in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
