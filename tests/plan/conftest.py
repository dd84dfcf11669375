"""One real training pass on random weights: what predictions are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class RealPass:
    """A model in training on the CPU, and one forward and backward of it."""

    model: Any
    engine: Any
    layout: list[tuple[int, list[int]]]
    images: int
    run: Callable[[], None]


def decoder_sizes(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    return sizes | changes


def text_config(family: str = "Llama", **changes: Any) -> Any:
    import transformers

    return getattr(transformers, f"{family}Config")(**decoder_sizes(**changes))


def llava_config(**changes: Any) -> Any:
    import transformers

    tower = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    return transformers.LlavaConfig(
        vision_config=tower, text_config=text_config(**changes), image_token_index=7, image_seq_length=16
    )


@pytest.fixture(scope="session")
def real_pass() -> Callable[..., RealPass]:
    """`real_pass(config, lora=..., projector=..., checkpointing=..., layout=..., images=..., shared=..., model=...)`."""
    return make_real_pass


def make_real_pass(
    config: Any, *, lora: dict[str, Any] | None, projector: bool = False, checkpointing: bool = False,
    layout: list[tuple[int, list[int]]], images: int = 0, shared: bool = True, model: Any = None,
) -> RealPass:  # fmt: skip
    import torch
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    from fasttrain.config import LoraConfig, TrainConfig
    from fasttrain.data.batch import PackBatch
    from fasttrain.data.packs import Pack
    from fasttrain.model.fused_layers import fuse_layers
    from fasttrain.model.fused_lora import fuse_lora
    from fasttrain.model.fused_rotary import fuse_rotary
    from fasttrain.model.lora import attach_lora, choose_trainable, language_model
    from fasttrain.model.policy import Policy
    from fasttrain.train.engine import TorchEngine

    config = copy.deepcopy(config)  # it notes which attention a model uses
    vision = config.model_type == "llava"
    torch.manual_seed(0)
    if model is None:
        model = (
            LlavaForConditionalGeneration(config)
            if vision
            else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        )
    policy = Policy(model)
    adapted = attach_lora(model, LoraConfig(**lora), projector) if lora else None
    choose_trainable(model, adapted, projector)
    fuse_rotary(language_model(model))
    if adapted is not None:
        fuse_lora(model)
    fuse_layers(language_model(model))
    policy.set_shared(shared)
    policy.train()
    engine = TorchEngine(policy, TrainConfig(output="unused"), checkpointing)
    tokens = sum(prompt + sum(completions) for prompt, completions in layout)
    lengths = [length for _, completions in layout for length in completions]
    ids_T = torch.randint(8, 300, (tokens,))
    pixel_ICHW = None
    if images:
        side = config.vision_config.image_size
        ids_T[: images * config.image_seq_length] = config.image_token_id
        pixel_ICHW = torch.randn(images, 3, side, side)
    batch = PackBatch(
        pack=Pack((), shared), shared=shared, layout=layout, input_ids_T=ids_T, uses_T=torch.zeros(tokens), target_N=torch.randint(8, 300, (sum(lengths),)),
        lengths_S=torch.tensor(lengths), sequence_ids=[],
        inputs=[{} if pixel_ICHW is None else {"pixel_values": pixel_ICHW}] * (1 if shared else len(layout)),
        images_per_run=[images] * (1 if shared else len(layout)), both_ways=[[] for _ in layout],
        pairs_P2=torch.zeros(0, 2, dtype=torch.int64), reference_N=None, keys=[], broken=[],
    )  # fmt: skip

    def run() -> None:
        engine.backward(engine.forward(batch).logprob.sum())

    return RealPass(model, engine, layout, images, run)


@pytest.fixture(scope="session")
def configs() -> dict[str, Any]:
    """Configurations of models that differ where counting can go wrong."""
    return {
        "llama": text_config(),
        "qwen2": text_config("Qwen2", tie_word_embeddings=True, num_key_value_heads=4),
        "wide": text_config(
            hidden_size=128, intermediate_size=320, num_hidden_layers=5, num_attention_heads=8
        ),
        "large": text_config(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=8,
        ),
        "llava": llava_config(),
        "mixtral": text_config("Mixtral", num_local_experts=4),
        "qwen3_moe": text_config(
            "Qwen3Moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16
        ),
    }
