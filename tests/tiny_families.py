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
    """Build the family's model and processor into `folder`; returns it."""
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

    build.__doc__ = qwen_vl.__doc__
    return build


def llava_next(tiny_models: ModuleType) -> Parts:
    """LLaVA-NeXT: tiles by aspect ratio, features without the padding, a newline after every row."""
    import transformers

    tokenizer = tokenizer_with(tiny_models)
    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84]]
    config = transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(**tiny_models.language_config(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**VISION), image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil(
        "llava_next", "LlavaNextImageProcessorPil", image_grid_pinpoints=pinpoints, size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
    )  # fmt: skip
    processor = transformers.LlavaNextProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def llava_onevision(tiny_models: ModuleType) -> Parts:
    """LLaVA-OneVision: as NeXT, but one tile per image where a prompt has several."""
    import transformers

    tokenizer = tokenizer_with(tiny_models, "<video>")
    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84]]
    id_of = tokenizer.convert_tokens_to_ids
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**tiny_models.language_config(tokenizer)),
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False), image_grid_pinpoints=pinpoints,
        image_token_index=id_of("<image>"), video_token_index=id_of("<video>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil(
        "llava_onevision", "LlavaOnevisionImageProcessorPil", image_grid_pinpoints=pinpoints,
        size={"height": 28, "width": 28},
    )  # fmt: skip
    processor = image_only(
        "llava_onevision", image_processor=pixels, tokenizer=tokenizer, num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def idefics3(kind: str, prefix: str, module: str) -> Callable[[ModuleType], Parts]:
    """Idefics3 and SmolVLM: rows and columns of tiles named in the text, masks of their pixels."""

    def build(tiny_models: ModuleType) -> Parts:
        import transformers

        grid = [f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)]
        marks = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>")
        tokenizer = tokenizer_with(tiny_models, *marks, *grid)
        config = getattr(transformers, f"{prefix}Config")(
            text_config=transformers.LlamaConfig(**tiny_models.language_config(tokenizer)),
            vision_config=VISION, scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
        )  # fmt: skip
        pixels = pil(
            module,
            f"{prefix}ImageProcessorPil",
            size={"longest_edge": 84},
            max_image_size={"longest_edge": 28},
        )
        options = {"image_processor": pixels, "tokenizer": tokenizer, "image_seq_len": 4}
        template = tokenizer.chat_template
        if kind == "smolvlm":
            return config, image_only(kind, chat_template=template, **options)
        return config, transformers.Idefics3Processor(chat_template=template, **options)

    build.__doc__ = idefics3.__doc__
    return build


def internvl(tiny_models: ModuleType) -> Parts:
    """InternVL: tiles and a thumbnail between a start and an end token."""
    import transformers

    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = tokenizer_with(tiny_models, image="<IMG_CONTEXT>\n", **names)
    vision = {**VISION, "image_size": [28, 28], "patch_size": [7, 7]}
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**tiny_models.language_config(tokenizer)), vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil(
        "got_ocr2",
        "GotOcr2ImageProcessorPil",
        size={"height": 28, "width": 28},
        crop_to_patches=True,
        max_patches=3,
    )
    processor = image_only(
        "internvl", image_processor=pixels, tokenizer=tokenizer, image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def gemma3(tiny_models: ModuleType) -> Parts:
    """Gemma 3: an image's tokens see each other both ways, every other layer slides over 24 tokens."""
    import transformers

    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = tokenizer_with(tiny_models, image="<start_of_image>", **names)
    id_of = tokenizer.convert_tokens_to_ids
    text = tiny_models.language_config(
        tokenizer, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**VISION, "vision_use_head": False}, mm_tokens_per_image=4,
        boi_token_index=id_of("<start_of_image>"), eoi_token_index=id_of("<end_of_image>"),
        image_token_index=id_of("<image_soft_token>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil("gemma3", "Gemma3ImageProcessorPil", size={"height": 28, "width": 28})
    processor = transformers.Gemma3Processor(
        image_processor=pixels, tokenizer=tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )
    return config, processor


def aya_vision(tiny_models: ModuleType) -> Parts:
    """Aya Vision: tiles of a SigLIP tower before a Cohere 2 decoder with sliding layers."""
    import transformers

    marks = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")
    tiles = ["TILE_GLOBAL", *(f"TILE_{number}" for number in range(1, 5))]
    tokenizer = tokenizer_with(tiny_models, *marks, *tiles)
    text = tiny_models.language_config(
        tokenizer, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    )
    config = transformers.AyaVisionConfig(
        text_config=transformers.Cohere2Config(**text), vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"), downsample_factor=2, tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil(
        "got_ocr2",
        "GotOcr2ImageProcessorPil",
        size={"height": 28, "width": 28},
        crop_to_patches=True,
        max_patches=3,
    )
    processor = transformers.AyaVisionProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=7, img_size=28, downsample_factor=2,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def paligemma(tiny_models: ModuleType) -> Parts:
    """PaliGemma: all tokens of a prompt see each other both ways, an answer's only what came before."""
    import transformers

    tokenizer = tokenizer_with(tiny_models, image_token="<image>")
    template = tokenizer.chat_template
    pixels = pil("siglip", "SiglipImageProcessorPil", size={"height": 28, "width": 28})
    pixels.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(
        image_processor=pixels, tokenizer=tokenizer, chat_template=template
    )
    text = tiny_models.language_config(tokenizer, head_dim=16)
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**text), vision_config={**VISION, "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=64, hidden_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    config.vision_config.projection_dim = 64
    return config, processor


def pixtral(kind: str) -> Callable[[ModuleType], Parts]:
    """Pixtral and Mistral 3: patches of images of any size, a token at the end of every row."""

    def build(tiny_models: ModuleType) -> Parts:
        import transformers

        from fasttrain.model.no_videos import pixtral_processor

        tokenizer = tokenizer_with(tiny_models, "[IMG]", "[IMG_BREAK]", "[IMG_END]", image="[IMG]")
        vision = transformers.PixtralVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=7,
        )  # fmt: skip
        text = transformers.MistralConfig(**tiny_models.language_config(tokenizer))
        image_id = tokenizer.convert_tokens_to_ids("[IMG]")
        merge = 2 if kind == "Mistral3" else 1
        more = {"spatial_merge_size": 2} if merge == 2 else {"vision_feature_select_strategy": "full"}
        config = getattr(transformers, f"{kind}Config")(
            text_config=text, vision_config=vision, image_token_index=image_id, vision_feature_layer=-1,
            tie_word_embeddings=False, **more,
        )  # fmt: skip
        size = {"longest_edge": 56}
        pixels = pil("pixtral", "PixtralImageProcessorPil", size=size, patch_size={"height": 7, "width": 7})
        processor = pixtral_processor()(
            image_processor=pixels, tokenizer=tokenizer, patch_size=7, spatial_merge_size=merge,
            chat_template=tokenizer.chat_template,
        )  # fmt: skip
        return config, processor

    build.__doc__ = pixtral.__doc__
    return build


def glm_v(kind: str, prefix: str, module: str, **text: Any) -> Callable[[ModuleType], Parts]:
    """GLM-4.1V and its relatives: patches of any number, positions on three axes, norms after each layer's parts as well."""

    def build(tiny_models: ModuleType) -> Parts:
        import transformers

        marks = (
            "<|video|>",
            "<|begin_of_image|>",
            "<|end_of_image|>",
            "<|begin_of_video|>",
            "<|end_of_video|>",
        )
        image = "<|begin_of_image|><|image|><|end_of_image|>"
        tokenizer = tokenizer_with(tiny_models, "<|image|>", *marks, image=image)
        id_of = tokenizer.convert_tokens_to_ids
        language = tiny_models.language_config(
            tokenizer, rope_parameters=rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5), **text
        )
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "image_size": 56,
            "out_hidden_size": 64,
        }  # fmt: skip
        config = getattr(transformers, f"{prefix}Config")(
            text_config=language, vision_config=vision, image_token_id=id_of("<|image|>"),
            video_token_id=id_of("<|video|>"), image_start_token_id=id_of("<|begin_of_image|>"),
            image_end_token_id=id_of("<|end_of_image|>"), video_start_token_id=id_of("<|begin_of_video|>"),
            video_end_token_id=id_of("<|end_of_video|>"),
        )  # fmt: skip
        size = {"shortest_edge": 28 * 28 * 2, "longest_edge": 56 * 56 * 2}
        pixels = pil(module.lower(), f"{module}ImageProcessorPil", patch_size=7, merge_size=2, size=size)
        template = tokenizer.chat_template
        return config, image_only(kind, image_processor=pixels, tokenizer=tokenizer, chat_template=template)

    build.__doc__ = glm_v.__doc__
    return build


def mllama(tiny_models: ModuleType) -> Parts:
    """Llama 3.2 Vision: the decoder's cross-attention layers look at the tiles; one token stands for an image."""
    import transformers

    tokenizer = tokenizer_with(tiny_models, image="<image>", image_token="<image>")
    tokenizer.chat_template = tokenizer.bos_token + tokenizer.chat_template
    text = tiny_models.language_config(tokenizer, num_hidden_layers=3, cross_attention_layers=[1])
    ratios = [[1, 1], [1, 2], [2, 1]]
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "image_size": 28, "patch_size": 7, "max_num_tiles": 2, "intermediate_layers_indices": [0, 1],
        "supported_aspect_ratios": ratios, "vision_output_dim": 96,
    }  # fmt: skip
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=image_id)
    pixels = pil("mllama", "MllamaImageProcessorPil", size={"height": 28, "width": 28}, max_image_tiles=2)
    processor = transformers.MllamaProcessor(
        image_processor=pixels, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )
    return config, processor


def vipllava(tiny_models: ModuleType) -> Parts:
    """VipLLaVA: features of several of the tower's layers side by side."""
    import transformers

    tokenizer = tokenizer_with(tiny_models)
    config = transformers.VipLlavaConfig(
        text_config=transformers.LlamaConfig(**tiny_models.language_config(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**VISION), vision_feature_layers=[-2, 1],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil(
        "clip", "CLIPImageProcessorPil", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = transformers.LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def llava_next_video(tiny_models: ModuleType) -> Parts:
    """LLaVA-NeXT-Video: images, as NeXT's."""
    import transformers

    tokenizer = tokenizer_with(tiny_models, "<video>")
    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84]]
    id_of = tokenizer.convert_tokens_to_ids
    config = transformers.LlavaNextVideoConfig(
        text_config=transformers.LlamaConfig(**tiny_models.language_config(tokenizer, num_key_value_heads=4)),
        vision_config=transformers.CLIPVisionConfig(**VISION), image_grid_pinpoints=pinpoints,
        image_token_index=id_of("<image>"), video_token_index=id_of("<video>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil(
        "llava_next", "LlavaNextImageProcessorPil", image_grid_pinpoints=pinpoints, size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
    )  # fmt: skip
    processor = image_only(
        "llava_next_video", image_processor=pixels, tokenizer=tokenizer, patch_size=7,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def idefics2(tiny_models: ModuleType) -> Parts:
    """Idefics2: resampled features between tokens that neighbouring images share, a space before a word that follows."""
    import transformers

    tokenizer = tokenizer_with(tiny_models, "<fake_token_around_image>", "<end_of_utterance>")
    # as its own template, nothing behind an image
    template = tokenizer.chat_template.replace("'<image>\n'", "'<image>'")
    assert template != tokenizer.chat_template
    perceiver = {
        "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 16,
        "num_key_value_heads": 1, "hidden_size": 64, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    config = transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**tiny_models.language_config(tokenizer)),
        vision_config={**VISION, "image_size": 56}, perceiver_config=perceiver,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil("idefics2", "Idefics2ImageProcessorPil", size={"shortest_edge": 28, "longest_edge": 56})
    processor = transformers.Idefics2Processor(
        image_processor=pixels, tokenizer=tokenizer, image_seq_len=4, chat_template=template
    )
    return config, processor


def aria(tiny_models: ModuleType) -> Parts:
    """Aria: a projector of queries before a mixture of experts."""
    import transformers

    tokenizer = tokenizer_with(tiny_models, image="<|img|>", image_token="<|img|>")
    text = tiny_models.language_config(tokenizer, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    config = transformers.AriaConfig(
        text_config=transformers.AriaTextConfig(**text),
        vision_config={**VISION, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 140},
        image_token_index=tokenizer.convert_tokens_to_ids("<|img|>"), projector_patch_to_query_dict={"49": 4},
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = transformers.AriaProcessor(
        image_processor=pil("aria", "AriaImageProcessorPil"), tokenizer=tokenizer,
        size_conversion={490: 4, 980: 4}, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def ovis2(tiny_models: ModuleType) -> Parts:
    """Ovis2: tiles as mixtures of visual words, with indicators of rows and columns."""
    import transformers

    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tokenizer = tokenizer_with(tiny_models, *marks, "<IMG_ATOM>")
    config = transformers.Ovis2Config(
        text_config=transformers.Qwen2Config(**tiny_models.language_config(tokenizer)),
        vision_config={**VISION, "hidden_stride": 2, "vocab_size": 24, "num_visual_indicator_tokens": 5},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(list(marks)), vocab_size=len(tokenizer),
        hidden_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    pixels = pil("ovis2", "Ovis2ImageProcessorPil", size=size, crop_to_patches=True, max_patches=3)
    processor = transformers.Ovis2Processor(
        image_processor=pixels, tokenizer=tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )
    return config, processor


def janus(tiny_models: ModuleType) -> Parts:
    """Janus: images that are read; the part that makes some stays as it is."""
    import transformers

    image = "<image_placeholder>"
    names = {"image_token": image, "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizer_with(tiny_models, image=image, **names)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
        "mlp_ratio": 2, "projection_dim": 64, "num_image_tokens": 16, "depth": 2,
    }  # fmt: skip
    painter = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "projection_dim": 64, "image_token_embed_dim": 64, "num_patches": 4,
    }  # fmt: skip
    config = transformers.JanusConfig(
        text_config=transformers.LlamaConfig(**tiny_models.language_config(tokenizer)), vision_config=vision,
        vq_config=painter, image_token_id=tokenizer.convert_tokens_to_ids(image), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil("janus", "JanusImageProcessorPil", size={"height": 28, "width": 28}, min_size=14)
    processor = transformers.JanusProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def deepseek_vl(tiny_models: ModuleType) -> Parts:
    """DeepSeek-VL: a SigLIP tower and an aligner."""
    import transformers

    image = "<image_placeholder>"
    tokenizer = tokenizer_with(tiny_models, image=image, image_token=image)
    config = transformers.DeepseekVLConfig(
        text_config=transformers.LlamaConfig(**tiny_models.language_config(tokenizer)),
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        image_token_id=tokenizer.convert_tokens_to_ids(image), tie_word_embeddings=False,
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    pixels = pil("deepseek_vl", "DeepseekVLImageProcessorPil", size=size, min_size=14)
    processor = transformers.DeepseekVLProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def paligemma2(tiny_models: ModuleType) -> Parts:
    """PaliGemma 2: the same around Gemma 2, with its softcaps."""
    import transformers

    config, processor = paligemma(tiny_models)
    text = tiny_models.language_config(
        processor.tokenizer, head_dim=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    )
    config.text_config = transformers.Gemma2Config(**text)
    return config, processor


def gemma4(tiny_models: ModuleType) -> Parts:
    """Gemma 4: patches of any number pooled, every other layer slides over 24 tokens."""
    import transformers

    names = {
        "image_token": "<image_soft>", "boi_token": "<boi>", "eoi_token": "<eoi>", "audio_token": "<audio_soft>",
        "boa_token": "<boa>", "eoa_token": "<eoa>", "video_token": "<|video|>",
    }  # fmt: skip
    tokenizer = tokenizer_with(tiny_models, image="<image_soft>", **names)
    ids = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(text)
        for name, text in names.items()
        if "bo" not in name
    }
    text = tiny_models.language_config(
        tokenizer, head_dim=16, global_head_dim=32, num_global_key_value_heads=1, sliding_window=24,
        layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=len(tokenizer),
        hidden_size_per_layer_input=16, num_kv_shared_layers=0,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "patch_size": 7, "pooling_kernel_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, tie_word_embeddings=False, **ids
    )
    size = {"patch_size": 7, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    processor = image_only(
        "gemma4", feature_extractor=transformers.Gemma4AudioFeatureExtractor(), tokenizer=tokenizer,
        image_processor=pil("gemma4", "Gemma4ImageProcessorPil", **size), chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def video_llama_3(tiny_models: ModuleType) -> Parts:
    """VideoLLaMA 3: patches of images of any size."""
    import transformers

    tokenizer = tokenizer_with(
        tiny_models, "<|video_pad|>", image="<|image_pad|>", image_token="<|image_pad|>"
    )
    vision = {name: size for name, size in VISION.items() if name != "image_size"}
    config = transformers.VideoLlama3Config(
        text_config=transformers.Qwen2Config(**tiny_models.language_config(tokenizer)), vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"), tie_word_embeddings=False,
    )  # fmt: skip
    size = {"shortest_edge": 14 * 14, "longest_edge": 28 * 28}
    pixels = pil("video_llama_3", "VideoLlama3ImageProcessorPil", patch_size=7, merge_size=1, size=size)
    template = tokenizer.chat_template
    return config, image_only(
        "video_llama_3", image_processor=pixels, tokenizer=tokenizer, chat_template=template
    )


def ernie_vl(tiny_models: ModuleType) -> Parts:
    """Ernie 4.5 VL: experts of its own for the tokens of images, positions on three axes."""
    import transformers

    names = {
        "image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO_PLACEHOLDER|>", "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
    }  # fmt: skip
    tokenizer = tokenizer_with(
        tiny_models, image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", **names
    )
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(text) for name, text in names.items()}
    text = tiny_models.language_config(
        tokenizer, rope_parameters=rope(mrope_section=[3, 3, 2]), moe_num_experts=4, moe_k=2,
        moe_intermediate_size=[48, 32], moe_num_shared_experts=1, mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2,
    }  # fmt: skip
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **ids
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    pixels = pil("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessorPil", patch_size=7, merge_size=2, size=size)
    template = tokenizer.chat_template
    return config, image_only(
        "ernie4_5_vl_moe", image_processor=pixels, tokenizer=tokenizer, chat_template=template
    )


def lighton_ocr(tiny_models: ModuleType) -> Parts:
    """LightOnOCR: patches of images of any size, merged, without marks of rows."""
    import transformers

    names = {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    }
    tokenizer = tokenizer_with(tiny_models, image="<|image_pad|>", **names)
    config = transformers.LightOnOcrConfig(
        text_config=transformers.Qwen3Config(**tiny_models.language_config(tokenizer, head_dim=16)),
        vision_config=transformers.PixtralVisionConfig(**{**VISION, "image_size": 56}), spatial_merge_size=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"), tie_word_embeddings=False,
    )  # fmt: skip
    size = {"longest_edge": 56}
    pixels = pil("pixtral", "PixtralImageProcessorPil", size=size, patch_size={"height": 7, "width": 7})
    processor = transformers.LightOnOcrProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=7, spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def hunyuan_vl(tiny_models: ModuleType) -> Parts:
    """HunYuan-VL: patches of any number with a token at the end of every row, positions on four axes."""
    import transformers

    names = {"image_token": "<IMAGE>", "image_start_token": "<BEGIN>", "image_end_token": "<END>"}
    tokenizer = tokenizer_with(tiny_models, "<NEWLINE>", image="<BEGIN><IMAGE><END>", **names)
    id_of = tokenizer.convert_tokens_to_ids
    text = tiny_models.language_config(
        tokenizer, head_dim=16, rope_parameters=rope(mrope_section=[2, 2, 2, 2])
    )
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "out_hidden_size": 64,
        "patch_size": 7, "max_image_size": 56, "min_image_size": 28,
    }  # fmt: skip
    config = transformers.HunYuanVLConfig(
        text_config=text, vision_config=vision, image_token_id=id_of("<IMAGE>"), im_start_id=id_of("<BEGIN>"),
        im_end_id=id_of("<END>"), im_newline_id=id_of("<NEWLINE>"), tie_word_embeddings=False,
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    pixels = pil("hunyuan_vl", "HunYuanVLImageProcessorPil", patch_size=7, merge_size=2, size=size)
    processor = transformers.HunYuanVLProcessor(
        image_processor=pixels, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )
    return config, processor


def qianfan_ocr(tiny_models: ModuleType) -> Parts:
    """Qianfan-OCR: tiles and a thumbnail in place of a placeholder that is no token of theirs."""
    import transformers

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokenizer = tokenizer_with(tiny_models, **names)
    config = transformers.QianfanOCRConfig(
        text_config=transformers.Qwen3Config(**tiny_models.language_config(tokenizer, head_dim=32)),
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    pixels = pil("got_ocr2", "GotOcr2ImageProcessorPil", size=size, crop_to_patches=True, max_patches=3)
    processor = transformers.QianfanOCRProcessor(
        image_processor=pixels, tokenizer=tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )
    return config, processor


def minicpm_v(tiny_models: ModuleType) -> Parts:
    """MiniCPM-V 4.6: an overview and slices of any size, their patches side by side, images that are numbered."""
    import transformers

    names = {
        "image_token": "<unk_image>", "video_token": "<unk_video>", "image_start_token": "<im>", "image_end_token": "</im>",
        "slice_start_token": "<slice>", "slice_end_token": "</slice>", "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }  # fmt: skip
    tokenizer = tokenizer_with(tiny_models, image="<unk_image>", **names)
    id_of = tokenizer.convert_tokens_to_ids
    config = transformers.MiniCPMV4_6Config(
        text_config=transformers.Qwen3Config(**tiny_models.language_config(tokenizer, head_dim=16)),
        vision_config={**VISION, "image_size": 56}, insert_layer_id=0, image_size=56, image_token_id=id_of("<unk_image>"),
        video_token_id=id_of("<unk_video>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = pil(
        "minicpmv4_6", "MiniCPMV4_6ImageProcessorPil", patch_size=7, scale_resolution=56, max_slice_nums=4
    )
    template = tokenizer.chat_template
    return config, image_only(
        "minicpmv4_6", image_processor=pixels, tokenizer=tokenizer, chat_template=template
    )


def cosmos3_edge(tiny_models: ModuleType) -> Parts:
    """Cosmos 3 Edge: patches of any number, positions on three axes, token types that its processor returns when told to."""
    import transformers

    marks = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer = tokenizer_with(tiny_models, "<|image_pad|>", *marks, image=image)
    id_of = tokenizer.convert_tokens_to_ids
    text = tiny_models.language_config(tokenizer, head_dim=16, rope_parameters=rope(mrope_section=[2, 3, 3]))
    vision = {name: size for name, size in VISION.items() if name != "image_size"}
    config = transformers.Cosmos3EdgeConfig(
        text_config=text, vision_config={**vision, "num_patches": 16}, projector_hidden_size=48,
        image_token_id=id_of("<|image_pad|>"), video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"), vision_end_token_id=id_of("<|vision_end|>"),
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    pixels = pil("cosmos3_edge", "Cosmos3EdgeImageProcessorPil", patch_size=7, merge_size=2, size=size)
    template = tokenizer.chat_template
    return config, image_only(
        "cosmos3_edge", image_processor=pixels, tokenizer=tokenizer, chat_template=template
    )


def granite_vision(tiny_models: ModuleType) -> Parts:
    """Granite Vision 4: tiles as NeXT's, features of several layers for several layers of the decoder."""
    import transformers

    tokenizer = tokenizer_with(tiny_models)
    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84]]
    text = tiny_models.language_config(
        tokenizer, num_hidden_layers=3, logits_scaling=3.0, embedding_multiplier=2.0, attention_multiplier=0.3
    )
    tower = {**VISION, "hidden_size": 64, "num_hidden_layers": 3}
    config = transformers.Granite4VisionConfig(
        text_config=text, vision_config=transformers.SiglipVisionConfig(**tower, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full", downsample_rate="1/2", deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[0, 1, 2, 2], tie_word_embeddings=False,
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48,
                        "cross_attention_frequency": 1, "use_qformer_text_input": False},
    )  # fmt: skip
    side = {"height": 28, "width": 28}
    pixels = pil(
        "llava_next", "LlavaNextImageProcessorPil", image_grid_pinpoints=pinpoints, size=side, crop_size=side
    )
    processor = transformers.Granite4VisionProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=7, vision_feature_select_strategy="full",
        downsample_rate="1/2", chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def internvl_moe(tiny_models: ModuleType) -> Parts:
    """InternVL 3.5 with experts: as InternVL, before a mixture of experts."""
    import transformers

    config, processor = internvl(tiny_models)
    text = tiny_models.language_config(
        processor.tokenizer, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    )
    config.text_config = transformers.Qwen3MoeConfig(**text)
    return config, processor


def deepseek_vl_hybrid(tiny_models: ModuleType) -> Parts:
    """DeepSeek-VL hybrid: a SigLIP tower and one of SAM's for the same image at a higher resolution."""
    import transformers

    image = "<image_placeholder>"
    tokenizer = tokenizer_with(tiny_models, image=image, image_token=image)
    closer = {
        "model_type": "sam_vision_model", "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 64, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1],
        "mlp_dim": 48,
    }  # fmt: skip
    config = transformers.DeepseekVLHybridConfig(
        text_config=transformers.LlamaConfig(**tiny_models.language_config(tokenizer)),
        vision_config={**VISION, "model_type": "siglip_vision_model"}, high_res_vision_config=closer,
        image_token_id=tokenizer.convert_tokens_to_ids(image), tie_word_embeddings=False,
    )  # fmt: skip
    sizes = {
        "size": {"height": 28, "width": 28},
        "high_res_size": {"height": 64, "width": 64},
        "min_size": 14,
    }
    processor = transformers.DeepseekVLHybridProcessor(
        image_processor=pil("deepseek_vl_hybrid", "DeepseekVLHybridImageProcessorPil", **sizes),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def qwen_patches(
    kind: str, prefix: str, vision: dict[str, Any], **text: Any
) -> Callable[[ModuleType], Parts]:
    """Families with Qwen2-VL's image processor: patches of any number."""

    def build(tiny_models: ModuleType) -> Parts:
        import transformers

        marks = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        tokenizer = tokenizer_with(tiny_models, "<|image_pad|>", *marks, image=image)
        id_of = tokenizer.convert_tokens_to_ids
        config = getattr(transformers, f"{prefix}Config")(
            text_config={**tiny_models.language_config(tokenizer), **text}, vision_config=vision,
            image_token_id=id_of("<|image_pad|>"), video_token_id=id_of("<|video_pad|>"), tie_word_embeddings=False,
        )  # fmt: skip
        size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
        pixels = pil("qwen2_vl", "Qwen2VLImageProcessorPil", patch_size=7, merge_size=2, size=size)
        template = tokenizer.chat_template
        return config, image_only(kind, image_processor=pixels, tokenizer=tokenizer, chat_template=template)

    build.__doc__ = qwen_patches.__doc__
    return build


def paddle_ocr(tiny_models: ModuleType) -> Parts:
    """PaddleOCR-VL: patches of any number, positions on three axes."""
    import transformers

    mark, start, end = "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"
    tokenizer = tokenizer_with(
        tiny_models, start, end, "<|video|>", image=f"{start}{mark}{end}", image_token=mark
    )
    id_of = tokenizer.convert_tokens_to_ids
    text = tiny_models.language_config(tokenizer, head_dim=16, rope_parameters=rope(mrope_section=[2, 3, 3]))
    config = transformers.PaddleOCRVLConfig(
        text_config=text, vision_config={**VISION, "image_size": 56}, image_token_id=id_of(mark),
        video_token_id=id_of("<|video|>"), vision_start_token_id=id_of(start), vision_end_token_id=id_of(end),
        tie_word_embeddings=False,
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    pixels = pil("paddleocr_vl", "PaddleOCRVLImageProcessorPil", patch_size=7, merge_size=2, size=size)
    processor = transformers.PaddleOCRVLProcessor(
        image_processor=pixels, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )
    return config, processor


def granite_docling(tiny_models: ModuleType) -> Parts:
    """Granite Docling: rows and columns of tiles named in the text, features of a second layer for the decoder's first."""
    import transformers

    grid = [f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)]
    marks = ("<fake_token_around_image>", "<global-img>")
    tokenizer = tokenizer_with(tiny_models, *marks, *grid, image_token="<image>")
    text = tiny_models.language_config(
        tokenizer, logits_scaling=0.7, embedding_multiplier=2.0, attention_multiplier=0.3
    )
    vision = {**VISION, "scale_factor": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    config = transformers.GraniteDoclingConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    processor = transformers.GraniteDoclingProcessor(
        image_processor=pil("granite_docling", "GraniteDoclingImageProcessorPil", size=size, max_patches=3),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def qwen_omni(tiny_models: ModuleType) -> Parts:
    """Qwen2.5-Omni's thinker: patches of any number, positions on three axes that it makes of an attention mask only."""
    import transformers

    names = {
        "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>", "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    }  # fmt: skip
    tokenizer = tokenizer_with(tiny_models, image="<|vision_bos|><|IMAGE|><|vision_eos|>", **names)
    id_of = tokenizer.convert_tokens_to_ids
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64,
        "window_size": 28, "fullatt_block_indexes": [1],
    }  # fmt: skip
    audio = {
        "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
        "output_dim": 64, "max_source_positions": 64,
    }  # fmt: skip
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=tiny_models.language_config(tokenizer, rope_parameters=rope(mrope_section=[2, 3, 3])),
        vision_config=vision, audio_config=audio, audio_token_index=id_of("<|AUDIO|>"), image_token_index=id_of("<|IMAGE|>"),
        video_token_index=id_of("<|VIDEO|>"), vision_start_token_id=id_of("<|vision_bos|>"),
        vision_end_token_id=id_of("<|vision_eos|>"), audio_start_token_id=id_of("<|audio_bos|>"),
        audio_end_token_id=id_of("<|audio_eos|>"),
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = image_only(
        "qwen2_5_omni", image_processor=pil("qwen2_vl", "Qwen2VLImageProcessorPil", patch_size=7, merge_size=2, size=size),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16), tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def qwen3_omni(tiny_models: ModuleType) -> Parts:
    """Qwen3-Omni's thinker: as Qwen2.5's around Qwen3-VL's tower, before a mixture of experts."""
    import transformers

    smaller, parts = qwen_omni(tiny_models)
    tokenizer = parts.tokenizer
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = tiny_models.language_config(
        tokenizer, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        rope_parameters=rope(mrope_section=[2, 3, 3], mrope_interleaved=True),
    )  # fmt: skip
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("image", "video", "audio")}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text, vision_config=vision, audio_config={**smaller.audio_config.to_dict(), "downsample_hidden_size": 8},
        vision_start_token_id=tokenizer.vision_bos_token_id, audio_start_token_id=tokenizer.audio_bos_token_id, **ids,
    )  # fmt: skip
    processor = image_only(
        "qwen3_omni_moe", image_processor=parts.image_processor, feature_extractor=parts.feature_extractor, tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def video_llava(tiny_models: ModuleType) -> Parts:
    """Video-LLaVA: images, as LLaVA-1.5's by another name."""
    import transformers

    tokenizer = tokenizer_with(tiny_models, "<video>")
    id_of = tokenizer.convert_tokens_to_ids
    config = transformers.VideoLlavaConfig(
        text_config=transformers.LlamaConfig(**tiny_models.language_config(tokenizer)),
        vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=id_of("<image>"),
        video_token_index=id_of("<video>"), image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = image_only(
        "video_llava", image_processor=transformers.VideoLlavaImageProcessor(**size), tokenizer=tokenizer, patch_size=7,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return config, processor


def cohere_compass(tiny_models: ModuleType) -> Parts:
    """Cohere's Compass: patches of any number, positions on three axes, layers with a window and without, scaled logits."""
    import transformers

    mark, video, start, end = "<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"
    tokenizer = tokenizer_with(tiny_models, mark, video, start, end, image=f"{start}{mark}{end}")
    id_of = tokenizer.convert_tokens_to_ids
    kinds = ["sliding_attention", "full_attention"]
    text = tiny_models.language_config(
        tokenizer, rope_parameters={kind: rope(mrope_section=[2, 3, 3]) for kind in kinds}, layer_types=kinds,
        sliding_window=24, logit_scale=0.5,
    )  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    config = transformers.CohereCompassConfig(
        text_config=text, vision_config=vision, image_token_id=id_of(mark), video_token_id=id_of(video),
        vision_start_token_id=id_of(start), vision_end_token_id=id_of(end),
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    pixels = pil("cohere_compass", "CohereCompassImageProcessorPil", patch_size=7, merge_size=2, size=size)
    template = tokenizer.chat_template
    return config, image_only(
        "cohere_compass", image_processor=pixels, tokenizer=tokenizer, chat_template=template
    )


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
    "Qwen3-VL-MoE": qwen_vl(
        "qwen3_vl_moe", "Qwen3VLMoe",
        {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
    ),
    "Qwen3.5": qwen_vl(
        "qwen3_5", "Qwen3_5",
        {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64,
            "num_position_embeddings": 64,
        },
        head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16,
    ),
    "Qwen3.5-MoE": qwen_vl(
        "qwen3_5_moe", "Qwen3_5Moe",
        {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 7, "out_hidden_size": 64,
            "num_position_embeddings": 64,
        },
        head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
    ),
    "GLM-4.1V": glm_v("glm4v", "Glm4v", "Glm4v"),
    "GLM-4.5V": glm_v(
        "glm4v_moe", "Glm4vMoe", "Glm4v", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=16,
    ),
    "GLM-OCR": glm_v("glm46v", "GlmOcr", "Glm46V", head_dim=16),
    "VipLLaVA": vipllava,
    "LLaVA-NeXT": llava_next,
    "LLaVA-NeXT-Video": llava_next_video,
    "LLaVA-OneVision": llava_onevision,
    "Idefics2": idefics2,
    "Idefics3": idefics3("idefics3", "Idefics3", "idefics3"),
    "SmolVLM": idefics3("smolvlm", "SmolVLM", "smolvlm"),
    "InternVL": internvl,
    "Gemma 3": gemma3,
    "Gemma 4": gemma4,
    "PaliGemma": paligemma,
    "PaliGemma 2": paligemma2,
    "Pixtral": pixtral("Llava"),
    "Mistral 3": pixtral("Mistral3"),
    "Aya Vision": aya_vision,
    "Mllama": mllama,
    "Aria": aria,
    "Ovis2": ovis2,
    "Janus": janus,
    "DeepSeek-VL": deepseek_vl,
    "VideoLLaMA 3": video_llama_3,
    "Ernie 4.5 VL": ernie_vl,
    "LightOnOCR": lighton_ocr,
    "HunYuan-VL": hunyuan_vl,
    "Qianfan-OCR": qianfan_ocr,
    "MiniCPM-V 4.6": minicpm_v,
    "Cosmos 3 Edge": cosmos3_edge,
    "Granite Vision 4": granite_vision,
    "InternVL-MoE": internvl_moe,
    "GLM-4.6V": glm_v("glm46v", "Glm46V", "Glm46V"),
    "DeepSeek-VL hybrid": deepseek_vl_hybrid,
    "EXAONE 4.5": qwen_patches(
        "exaone4_5", "Exaone4_5_",
        {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_key_value_heads": 1, "patch_size": 7,
            "out_hidden_size": 64, "window_size": 28, "fullatt_block_indexes": [1],
        },
        model_type="exaone4", sliding_window=24, layer_types=["sliding_attention", "full_attention"],
    ),
    "HyperCLOVA X Vision": qwen_patches(
        "hyperclovax_vision_v2", "HyperCLOVAXVisionV2",
        {
            "model_type": "qwen2_5_vl_vision", "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "patch_size": 7, "out_hidden_size": 64, "window_size": 28, "fullatt_block_indexes": [1],
        },
        model_type="hyperclovax", logits_scaling=3.0, embedding_multiplier=2.0, attention_multiplier=0.3,
    ),
    "LFM3-VL": qwen_patches(
        "lfm3_vl", "Lfm3Vl",
        {
            "hidden_size": 32, "intermediate_size": 48, "patch_size": 7, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        model_type="lfm3",
    ),
    "PaddleOCR-VL": paddle_ocr,
    "Granite Docling": granite_docling,
    "Qwen2.5-Omni": qwen_omni,
    "Qwen3-Omni": qwen3_omni,
    "Video-LLaVA": video_llava,
    "Cohere Compass": cohere_compass,
}  # fmt: skip

# Why families that do not share prompts do not.
UNSHARED = {
    "Mllama": "it sees images through cross-attention layers",
    "Qwen3.5": "it has layers of type linear_attention",
    "Qwen3.5-MoE": "it has layers of type linear_attention",
    "LFM3-VL": "it has layers of type conv",
}
