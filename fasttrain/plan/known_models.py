"""Published sizes of the models that the recipes name, so that `plan` answers without their config.json.

Sources, the config.json of each repository on huggingface.co at its main branch: llava-hf/llava-1.5-7b-hf, llava-hf/llava-1.5-13b-hf
(language model: lmsys/vicuna-7b-v1.5 and vicuna-13b-v1.5, tower: openai/clip-vit-large-patch14-336), Qwen/Qwen2.5-VL-7B-Instruct.
Only sizes are here; a config.json that is in a folder or in the local hub cache is used instead.
"""

from __future__ import annotations

from typing import Any

_CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


def _llava(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llava", "image_token_index": 32000, "image_seq_length": 576, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu", "vision_config": _CLIP_L_336,
        "text_config": {
            "model_type": "llama", "vocab_size": 32064, "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        },
    }  # fmt: skip


KNOWN: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": _llava(4096, 11008, 32, 32),
    "llava-hf/llava-1.5-13b-hf": _llava(5120, 13824, 40, 40),
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl", "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "tie_word_embeddings": False,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
        },
        "text_config": {
            "model_type": "qwen2_5_vl_text", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    },
}  # fmt: skip


def known_config(name: str) -> Any | None:
    """The transformers configuration of a published model, None if its sizes are not here."""
    from transformers import AutoConfig

    if name not in KNOWN:
        return None
    sizes = dict(KNOWN[name])
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
