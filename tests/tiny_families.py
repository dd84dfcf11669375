"""Tiny random models of the vision-language families' real classes, with their real processors (PIL image processing)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
Parts = tuple[Any, Any]  # configuration of the model, processor


def save(tiny_models: ModuleType, folder: Path, name: str, seed: int = 7) -> Path:
    """Build the family's model and processor into `folder`."""
    import torch
    import transformers

    config, processor = FAMILIES[name](tiny_models)
    # weights of the embeddings' padding row and buffers come from the class; all else is drawn
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    tiny_models.draw_weights(model, seed, 0.12).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tokenizer_with(tiny_models: ModuleType, *tokens: str, image: str = "<image>", **named: str) -> Any:
    """The tiny tokenizer with a ChatML template that writes `image` for an image, and more special tokens."""
    template = tiny_models.CHATML.replace("<image>", image)
    tokenizer = tiny_models.build_tokenizer(template, eos="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, *named.values()]})
    if named:
        tokenizer.init_kwargs["extra_special_tokens"] = named
        tokenizer._set_model_specific_special_tokens(special_tokens=named)
    return tokenizer


def pil(module: str, name: str, **settings: Any) -> Any:
    return getattr(
        importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name
    )(**settings)


def image_only(kind: str, **parts: Any) -> Any:
    """The processor class of a model type, without videos where torchvision is missing."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    from fasttrain.model.no_videos import without_videos

    found = without_videos(kind) or getattr(transformers, PROCESSOR_MAPPING_NAMES[kind])
    return found(video_processor=None, **parts)


def rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **more}


def qwen_vl(kind: str, prefix: str, vision: dict[str, Any], **text: Any) -> Callable[[ModuleType], Parts]:
    """Qwen2-VL and its successors: patches of any number, positions on three axes."""

    def build(tiny_models: ModuleType) -> Parts:
        import transformers

        marks = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        tokenizer = tokenizer_with(tiny_models, "<|image_pad|>", *marks, image=image)
        id_of = tokenizer.convert_tokens_to_ids
        language = tiny_models.language_config(
            tokenizer, rope_parameters=rope(mrope_section=[2, 3, 3]), **text
        )
        config = getattr(transformers, f"{prefix}Config")(
            text_config=language, vision_config=vision, image_token_id=id_of("<|image_pad|>"),
            video_token_id=id_of("<|video_pad|>"), vision_start_token_id=id_of("<|vision_start|>"),
            vision_end_token_id=id_of("<|vision_end|>"), tie_word_embeddings=False,
        )  # fmt: skip
        pixels = pil(
            "qwen2_vl", "Qwen2VLImageProcessorPil", patch_size=7, merge_size=2,
            size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56},
        )  # fmt: skip
        template = tokenizer.chat_template
        return config, image_only(kind, image_processor=pixels, tokenizer=tokenizer, chat_template=template)

    return build


FAMILIES: dict[str, Callable[[ModuleType], Parts]] = {
    "Qwen2-VL": qwen_vl(
        "qwen2_vl", "Qwen2VL",
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7},
    ),
    "Qwen2.5-VL": qwen_vl(
        "qwen2_5_vl", "Qwen2_5_VL",
        {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64,
            "window_size": 28, "fullatt_block_indexes": [1],
        },
    ),
    "Qwen3-VL": qwen_vl(
        "qwen3_vl", "Qwen3VL",
        {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        head_dim=16,
    ),
}  # fmt: skip
