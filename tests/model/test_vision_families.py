"""Vision-language families with their real classes: shared prompts give the losses and gradients of ordinary sequences."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location(
    "tiny_families", Path(__file__).parent.parent / "tiny_families.py"
)
assert _spec is not None and _spec.loader is not None
tiny_families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_families)


@pytest.fixture(scope="module")
def build(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tiny_families.save(tiny_models, tmp_path_factory.mktemp("vision") / name, name)
        return made[name]

    return make


def train(model: Path, pairs: Path, folder: Path, *settings: str) -> Any:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    raw = {
        "model": {"name": str(model)},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(pairs), "workers": 0},
        "train": {
            "output": str(folder / "run"), "max_steps": 2, "pairs_per_step": 7, "learning_rate": 1e-2,
            "tokens_per_pack": 400, "warmup_ratio": 0.0, "schedule": "constant",
        },
        "track": [],
    }  # fmt: skip
    return train_dpo(config_from_dict(raw, settings), overwrite=True).metrics


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_sharing_prompts_with_images_gives_the_losses_of_ordinary_sequences(
    name: str, build: Callable[[str], Path], vision_pairs: Callable[..., Path], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, pairs = build(name), vision_pairs(tmp_path / "data", 10, images=(1, 2, 0), turns=(1, 2))
    shared = train(model, pairs, tmp_path)
    reason, err = tiny_families.UNSHARED.get(name), capfd.readouterr().err
    assert f"cannot share prefixes: {reason};" in err if reason else "warning" not in err
    ordinary = train(model, pairs, tmp_path, "train.share_prefix=false")
    assert shared[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert abs(shared[1]["loss"] - 0.6931472) > 1e-3
    assert (shared[0]["tokens"] < ordinary[0]["tokens"]) == (reason is None)
    for a, b in zip(shared, ordinary):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_processor_that_needs_torchvision_is_one_line(tmp_path: Path) -> None:
    import json

    from transformers.utils import is_torchvision_available

    from fasttrain.config import ModelConfig
    from fasttrain.errors import UserError
    from fasttrain.model.load import load_processor

    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3"}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    with pytest.raises(
        UserError, match=r"model\.name: cannot load a processor .*: PixtralProcessor requires the Torchvision"
    ):
        load_processor(tmp_path, ModelConfig(name=str(tmp_path)), True)
