"""Floating-point operations of a pass, counted from the shapes of the model's own matrices and the lengths of the pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fasttrain.model.lora import PROJECTOR, language_model


@dataclass(frozen=True)
class ModelShape:
    """Multiply-add sizes of a model: what one token, one visible pair, one head row and one image cost."""

    frozen_weights: int  # elements of the decoder's matrices without gradient
    trained_weights: int
    adapter_weights: int
    attention_width: int  # sum over layers of heads x head size
    head_weights: int
    head_trained: bool
    vision_per_image: int  # flops of tower and projector, forward
    projector_per_image: int  # the projector's share, forward
    projector_trained: bool


def measure_shape(model: Any) -> ModelShape:
    """Read the sizes off the modules."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    head_size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    frozen = trained = adapter = 0
    for name, module in language_model(model).named_modules():
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features  # a quantised weight has fewer elements
        elif type(module).__name__ == "Conv1D":
            size = module.weight.numel()
        else:
            continue
        if "lora_" in name:
            adapter += size
        elif module.weight.requires_grad:
            trained += size
        else:
            frozen += size
    head = model.get_output_embeddings().weight
    vision, projector, projector_trained = _vision_flops(model)
    return ModelShape(
        frozen_weights=frozen,
        trained_weights=trained,
        adapter_weights=adapter,
        attention_width=config.num_hidden_layers * heads * head_size,
        head_weights=head.numel(),
        head_trained=head.requires_grad,
        vision_per_image=vision,
        projector_per_image=projector,
        projector_trained=projector_trained,
    )


def _vision_flops(model: Any) -> tuple[int, int, bool]:
    tower = getattr(model.base_model, "vision_tower", None)
    if tower is None:
        return 0, 0, False
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    weights = sum(m.in_features * m.out_features for m in tower.modules() if isinstance(m, nn.Linear))
    patch = sum(m.weight.numel() for m in tower.modules() if isinstance(m, nn.Conv2d))
    attention = 4 * vision.hidden_size * (patches + 1) ** 2 * vision.num_hidden_layers
    flops = 2 * (patches + 1) * weights + 2 * patches * patch + attention
    seen: dict[int, nn.Linear] = {}
    for name, module in model.named_modules():
        if PROJECTOR in name and isinstance(module, nn.Linear) and "original_module" not in name:
            seen[id(module)] = module
    projector = 2 * patches * sum(m.in_features * m.out_features for m in seen.values())
    return flops + projector, projector, any(m.weight.requires_grad for m in seen.values())


def visible_pairs(layout: list[tuple[int, list[int]]]) -> int:
    """(query, key) pairs that a shared-prefix sequence attends to."""
    total = 0
    for prompt, completions in layout:
        total += prompt * (prompt + 1) // 2
        total += sum(length * prompt + length * (length + 1) // 2 for length in completions)
    return total


def pass_flops(
    shape: ModelShape,
    layout: list[tuple[int, list[int]]],
    images: int,
    *,
    backward: bool,
    checkpointing: bool,
) -> int:
    """Operations of one pack: forward, and backward with the unit-gradient head and recomputation if asked."""
    tokens = sum(prompt + sum(completions) for prompt, completions in layout)
    rows = sum(sum(completions) for _, completions in layout)
    linear = 2 * tokens * (shape.frozen_weights + shape.trained_weights + shape.adapter_weights)
    attention = 4 * visible_pairs(layout) * shape.attention_width
    head = 2 * rows * shape.head_weights
    flops = linear + attention + head + images * shape.vision_per_image
    if backward:
        flops += 2 * tokens * (shape.frozen_weights + 2 * (shape.trained_weights + shape.adapter_weights))
        flops += attention * 5 // 2
        flops += 3 * head if shape.head_trained else head  # recompute, dH and dW; or the unit gradient
        flops += linear + attention if checkpointing else 0
        flops += 2 * images * shape.projector_per_image if shape.projector_trained else 0
    return flops
