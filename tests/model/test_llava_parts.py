"""LLaVA with other parts than LLaVA-1.5's: shared equals ordinary, and a processor that does not fit the model is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip


@pytest.fixture
def build(tiny_models: Any, tmp_path: Path) -> Callable[..., Path]:
    """A LLaVA from a tower ("CLIP" or "Siglip"), the layers its features come from, and a text family."""

    def make(tower: str, layers: Any, strategy: str, family: str, **changes: Any) -> Path:
        import transformers
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        tokenizer = tiny_models.build_tokenizer(tiny_models.VICUNA, eos="</s>")
        common = tiny_models.language_config(tokenizer, **changes)
        text = getattr(transformers, f"{family}Config")(**common)
        config = transformers.LlavaConfig(
            vision_config=getattr(transformers, f"{tower}VisionConfig")(**VISION),
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=layers,
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=text.tie_word_embeddings,
        )
        folder = tmp_path / "llava"
        model = transformers.LlavaForConditionalGeneration(config)
        tiny_models.draw_weights(model, 5).save_pretrained(folder)
        pixels = (
            CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
            if tower == "CLIP"
            else SiglipImageProcessorPil(size={"height": 28, "width": 28})
        )
        transformers.LlavaProcessor(
            image_processor=pixels, tokenizer=tokenizer, patch_size=7, vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(tower == "CLIP"), chat_template=tiny_models.VICUNA,
        ).save_pretrained(folder)  # fmt: skip
        return folder

    return make


def train(model: Path, pairs: Path, folder: Path, *settings: str) -> Any:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    raw = {
        "model": {"name": str(model)},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(pairs), "workers": 0},
        "train": {
            "output": str(folder / "run"), "max_steps": 3, "pairs_per_step": 5, "learning_rate": 1e-2,
            "tokens_per_pack": 200, "warmup_ratio": 0.0, "schedule": "constant",
        },
        "track": [],
    }  # fmt: skip
    return train_dpo(config_from_dict(raw, settings), overwrite=True).metrics


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        (("CLIP", -2, "full", "Llama"), {}),
        (("CLIP", [-2, -1], "default", "Qwen2"), {"tie_word_embeddings": True}),
        (("Siglip", -1, "full", "Llama"), {}),
        (
            ("CLIP", -2, "default", "Gemma2"),
            {"head_dim": 16},
        ),  # has no SDPA, and LLaVA calls it without its cap
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_other_towers_layers_and_text_models_train(
    parts: tuple[Any, ...], changes: dict[str, Any], build: Callable[..., Path], vision_pairs: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    model, pairs = build(*parts, **changes), vision_pairs(tmp_path / "data", 8, images=(1, 2, 0))
    shared = train(model, pairs, tmp_path)
    ordinary = train(model, pairs, tmp_path, "train.share_prefix=false")
    assert shared[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    for a, b in zip(shared, ordinary):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-5)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            {"vision_feature_select_strategy": "full"},
            "the processor writes 16 tokens for an image, the model makes another",
        ),
        (
            "processor_config.json",
            {"patch_size": None},
            r"LlavaProcessor does not take a text and its images: TypeError: .* \(processor_config.json sets no patch_size\)",
        ),
        (
            "processor_config.json",
            {"patch_size": 14},
            "the processor writes 4 tokens for an image, the model makes another",
        ),
        (
            "config.json",
            {"image_token_index": 9},
            "wanted a processor that writes the model's image token 9, got token 6",
        ),
    ],
)
def test_a_processor_that_does_not_fit_the_model_is_one_line(
    file: str, change: dict[str, Any], message: str, tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path
) -> None:  # fmt: skip
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    settings = json.loads((model / file).read_text())
    assert change.keys() <= settings.keys()
    (model / file).write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=f"model.name: {message}"):
        train(model, vision_pairs(tmp_path / "data", 4), tmp_path)


@pytest.mark.parametrize(
    ("tower", "layers", "strategy"), [("CLIP", -2, "default"), ("Siglip", [-3, -1], "full")]
)
def test_images_are_put_into_text_as_transformers_does(
    build: Callable[..., Path], tower: str, layers: Any, strategy: str
) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    from fasttrain.model.no_waiting import embed_with_images, trust_placeholders

    folder = build(tower, layers, strategy, "Llama")
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    image = model.config.image_token_id
    ids = torch.randint(image + 1, image + 9, (61,))
    ids[4:20], ids[29:45] = image, image
    pixels = torch.randn(2, 3, 28, 28)
    weights = list(model.parameters())
    found = []
    whole: dict[str, Any] = {"input_ids": ids[None], "pixel_values": pixels}
    for given in (whole, {"inputs_embeds": embed_with_images(model.model, ids, pixels)}, whole):
        hidden = model.model(**given, use_cache=False).last_hidden_state
        gradients = torch.autograd.grad(hidden.square().sum(), weights, allow_unused=True)
        found.append([hidden.detach(), *gradients])
        trust_placeholders(model.model)  # for the last way
    for theirs, *others in zip(*found, strict=True):
        for ours in others:
            assert (theirs is None) == (ours is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def test_only_a_tower_of_one_image_size_goes_uncompared(build: Callable[..., Path]) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    from fasttrain.model.no_waiting import images_are_alike

    folder = build("CLIP", -2, "default", "Llama")
    base = LlavaForConditionalGeneration.from_pretrained(folder).model
    pixels, sizes = torch.zeros(1, 3, 28, 28), torch.tensor([[28, 28]])
    assert images_are_alike(base, {"pixel_values": pixels})
    assert not images_are_alike(base, {"pixel_values": pixels, "image_sizes": sizes})  # as Pixtral's
    assert not images_are_alike(base.language_model, {"pixel_values": pixels})
