"""Vision-language families with their real classes: shared prompts give the losses and gradients of ordinary sequences."""

from __future__ import annotations

import importlib.util
import re
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
    assert f"cannot share prefixes: {reason};" in err if reason else "warning: " not in err
    ordinary = train(model, pairs, tmp_path, "train.share_prefix=false")
    assert shared[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert abs(shared[1]["loss"] - 0.6931472) > 1e-3
    assert (shared[0]["tokens"] < ordinary[0]["tokens"]) == (reason is None)
    for a, b in zip(shared, ordinary):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of arrays made of tensors
# but PaliGemma's, which puts its own <s> and newline around what a chat template has written
@pytest.mark.parametrize(
    "name", [name for name in tiny_families.FAMILIES if not name.startswith("PaliGemma")]
)
def test_ids_and_inputs_are_those_of_the_processor_called_with_the_whole_text(
    name: str, build: Callable[[str], Path], tiny_models: ModuleType, tmp_path: Path
) -> None:
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    from fasttrain.config import ModelConfig
    from fasttrain.data.pairs import IMAGE
    from fasttrain.data.tokens import ChatTokenizer
    from fasttrain.model.families import FamilyInputs
    from fasttrain.model.load import load_processor, stop_token_ids

    folder = build(name)
    processor = load_processor(folder, ModelConfig(name=str(folder)), True)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        family = FamilyInputs(transformers.AutoModelForImageTextToText.from_config(config), processor)
    chat = ChatTokenizer(processor, stop_token_ids(processor, folder))
    files = [tiny_models.draw_image(tmp_path / f"{number}.png", number) for number in range(3)]
    images = [Image.open(file).convert("RGB") for file in files]
    say = (("text", "what is it?"),)
    messages = (("user", (IMAGE, IMAGE, *say)), ("assistant", say), ("user", (IMAGE, *say)))
    prompt = chat.prompt(messages, "x", [image.size for image in images])
    answer = chat.completion(messages, prompt, "blue green left", "x")
    ids = np.concatenate([prompt.ids, answer])
    pixels = chat.pixels([file.read_bytes() for file in files])
    ours = {**pixels, **family.sequence(ids, pixels, len(prompt.ids))}
    text = prompt.text + chat.tokenizer.decode(answer)
    # Cosmos' model wants what its processor returns only when told to
    more = {"return_mm_token_type_ids": True} if name.startswith("Cosmos") else {}
    theirs = dict(
        processor(images=[images], text=[text], add_special_tokens=False, return_tensors="pt", **more)
    )
    assert ids.tolist() == theirs.pop("input_ids")[0].tolist()
    del theirs["attention_mask"]
    ours.pop("attention_mask", None)
    assert ours.keys() == theirs.keys()
    for argument, value in theirs.items():
        assert torch.equal(ours[argument].to(value.dtype), value), argument


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_every_family_has_a_projector_that_train_projector_finds(name: str, tiny_models: ModuleType) -> None:
    import torch
    import transformers

    from fasttrain.config import LoraConfig
    from fasttrain.model.head import install_head
    from fasttrain.model.lora import attach_lora, choose_trainable, in_projector, language_model

    config, _ = tiny_families.FAMILIES[name](tiny_models)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    install_head(model)
    adapted = attach_lora(model, LoraConfig(rank=2, alpha=4, targets="auto"), train_projector=True)
    choose_trainable(model, adapted, train_projector=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained and all(in_projector(n) for n in trained)
    towers = ("vision_tower", "vision_model.encoder", "visual.blocks", "language_model", "text_model")
    inside = "vision_tower.patch_merger"  # HunYuan's projector
    assert not any(tower in n.replace(inside, "") for n in trained for tower in towers)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and "original_module" not in n}
    assert not any(re.search(r"visual\.\w*merger", n) for n in frozen)  # Qwen's, for one layer or several
    decoder = {id(parameter) for parameter in language_model(model).parameters()}
    assert all(id(p) in decoder for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize(
    "name", ["Idefics3", "Qwen3-VL", "Gemma 3"]
)  # connector; merger and deepstack's; LLaVA's name
def test_a_projector_trains_the_same_through_shared_prompts(
    name: str, build: Callable[[str], Path], vision_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    model, pairs = build(name), vision_pairs(tmp_path / "data", 6, images=(1, 2, 0))
    settings = ["model.train_projector=true", "train.projector_learning_rate=0.01"]
    shared = train(model, pairs, tmp_path, *settings)
    frozen = train(model, pairs, tmp_path)
    ordinary = train(model, pairs, tmp_path, *settings, "train.share_prefix=false")
    assert shared[0]["grad_norm"] > frozen[0]["grad_norm"] * 1.0001
    assert shared[1]["loss"] != pytest.approx(frozen[1]["loss"], rel=1e-5)
    for a, b in zip(shared, ordinary):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft tells what it does with parameters
def test_experts_named_in_lora_targets_train_the_same_through_shared_prompts(
    build: Callable[[str], Path], vision_pairs: Callable[..., Path], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, pairs = build("Qwen3-VL-MoE"), vision_pairs(tmp_path / "data", 6, images=(1, 2, 0))
    plain = train(model, pairs, tmp_path)
    assert "the fused weights of the experts" in capfd.readouterr().err
    targets = "lora.targets=[q_proj, experts.gate_up_proj, experts.down_proj]"
    shared = train(model, pairs, tmp_path, targets)
    assert "the fused weights" not in capfd.readouterr().err
    ordinary = train(model, pairs, tmp_path, targets, "train.share_prefix=false")
    assert shared[0]["aux_loss"] == pytest.approx(plain[0]["aux_loss"], rel=1e-5)
    assert shared[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-2)
    for a, b in zip(shared, ordinary):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_processor_with_videos_loads_without_them_where_torchvision_is_installed(
    build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain.config import ModelConfig
    from fasttrain.model.load import load_processor

    folder = build("Qwen2-VL")
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: True)
    processor = load_processor(folder, ModelConfig(name=str(folder)), True)
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"


def test_a_processor_that_needs_torchvision_is_one_line(tmp_path: Path) -> None:
    import json

    from transformers.utils import is_torchvision_available

    from fasttrain.config import ModelConfig
    from fasttrain.errors import UserError
    from fasttrain.model.load import load_processor

    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cohere2_vision"}))
    about = {
        "processor_class": "Cohere2VisionProcessor",
        "image_processor": {"image_processor_type": "Cohere2VisionImageProcessor"},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"model\.name: cannot load a processor .*: .*[Tt]orchvision"):
        load_processor(tmp_path, ModelConfig(name=str(tmp_path)), True)
