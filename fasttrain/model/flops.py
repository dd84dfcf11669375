"""Floating-point operations of a pass, counted from the shapes of the model's own matrices and the lengths of the pack.

Equal to what torch's FlopCounterMode sees, when it counts a causal kernel's visible pairs and the head's in-place products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fasttrain.model.last_layer import trimmed_mlp
from fasttrain.model.lora import fused_experts, in_projector, language_model
from fasttrain.ranks import full_shape


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
    projector_backward_per_image: int  # 0 when the projector is frozen
    fed_by_embeddings: int  # elements of matrices whose input has no gradient if the embeddings have none
    embeddings_trained: bool
    not_recomputed: int  # elements of matrices whose result no backward needs: checkpointing stops before
    last_frozen: int  # elements of the last layer's matrices that shared passes run for predicting rows only
    last_trained: int  # the same of those with a gradient, adapters included


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
            size = full_shape(module.weight).numel()
        else:
            continue
        if "lora_" in name:
            adapter += size
        elif module.weight.requires_grad:
            trained += size
        else:
            frozen += size
    for parameter in fused_experts(model).values():  # every token goes through some of the experts
        active = _experts_per_token(config) * full_shape(parameter)[1:].numel()
        trained, frozen = (
            (trained + active, frozen) if parameter.requires_grad else (trained, frozen + active)
        )
    head = model.get_output_embeddings().weight
    vision, projector_backward = _vision_flops(model)
    fed, last = _edges(language_model(model))
    last_frozen, last_trained = _last_mlp(language_model(model))
    return ModelShape(
        frozen_weights=frozen,
        trained_weights=trained,
        adapter_weights=adapter,
        attention_width=config.num_hidden_layers * heads * head_size,
        head_weights=full_shape(head).numel(),
        head_trained=head.requires_grad,
        vision_per_image=vision,
        projector_backward_per_image=projector_backward,
        fed_by_embeddings=fed,
        embeddings_trained=model.get_input_embeddings().weight.requires_grad,
        not_recomputed=last,
        last_frozen=last_frozen,
        last_trained=last_trained,
    )


def _experts_per_token(config: Any) -> int:
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 1)


def _edges(decoder: nn.Module) -> tuple[int, int]:
    """Elements of the first layer's projections of the embeddings, and of every layer's last product.

    The first: all linears of the first attention but its last. The last: a layer's last linear, or what its adapter adds last.
    """
    layers = next((module for module in decoder.children() if isinstance(module, nn.ModuleList)), None)
    if not layers:
        return 0, 0
    attention = next((m for m in layers[0].children() if "attention" in type(m).__name__.lower()), None)
    entries = list(attention.children()) if attention is not None else []
    linears = [entry for entry in entries if sum(_sizes(entry).values())]
    fed = sum(
        size
        for entry in linears[:-1]
        for name, size in _sizes(entry).items()
        if "lora_B" not in name and "lora_embedding" not in name
    )
    # a trimmed layer puts its rows in place behind that product
    ending = layers if trimmed_mlp(decoder) is None else layers[:-1]
    return fed, sum(_last_product(layer) for layer in ending)


def _last_mlp(decoder: nn.Module) -> tuple[int, int]:
    """Elements of the trimmed MLP's frozen matrices, and of those that train."""
    mlp, frozen, trained = trimmed_mlp(decoder), 0, 0
    for module in mlp.modules() if mlp is not None else ():
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
            frozen, trained = (
                (frozen, trained + size) if module.weight.requires_grad else (frozen + size, trained)
            )
    return frozen, trained


def _sizes(module: nn.Module) -> dict[str, int]:
    """Elements of every matrix in a module, by name."""
    return {
        name: m.in_features * m.out_features for name, m in module.named_modules() if isinstance(m, nn.Linear)
    }


def _last_product(layer: nn.Module) -> int:
    sizes = _sizes(layer)
    if not sizes:
        return 0
    name = list(sizes)[-1]  # an adapter's lora_B comes after its base layer and its lora_A
    owner = layer.get_submodule(name.partition(".lora_")[0])
    return (
        0 if type(owner).__name__ == "FusedLoraLinear" else sizes[name]
    )  # fused, it keeps what it makes last


def counts_tower(config: Any) -> bool:
    """Whether the number of images tells what vision tower and projector cost; elsewhere they are left out.

    In LLaVA-1.5 every image goes through the tower once, at one size, and each of its patches through the projector. Other
    families cut images into tiles, take them at any size, or pool patches before the projector.
    """
    vision = getattr(config, "vision_config", None)
    return config.model_type == "llava" and getattr(vision, "model_type", None) != "pixtral"


def _vision_flops(model: Any) -> tuple[int, int]:
    """Forward of tower and projector for one image, and the backward of the projector alone; 0 where they are not counted."""
    if not counts_tower(model.config):
        return 0, 0
    tower, vision = model.base_model.vision_tower, model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    weights = sum(m.in_features * m.out_features for m in tower.modules() if isinstance(m, nn.Linear))
    patch = sum(full_shape(m.weight).numel() for m in tower.modules() if isinstance(m, nn.Conv2d))
    attention = 4 * vision.hidden_size * (patches + 1) ** 2 * vision.num_hidden_layers
    flops = 2 * (patches + 1) * weights + 2 * patches * patch + attention
    seen: dict[int, nn.Linear] = {}
    for name, module in model.named_modules():
        if in_projector(name) and isinstance(module, nn.Linear) and "original_module" not in name:
            seen[id(module)] = module
    sizes = [m.in_features * m.out_features for m in seen.values()]
    trained = any(m.weight.requires_grad for m in seen.values())
    backward = 2 * patches * (2 * sum(sizes) - sizes[0]) if trained else 0  # the tower needs no gradient
    return flops + 2 * patches * sum(sizes), backward


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
    shared: bool = True,
    given: int = 0,
) -> int:
    """Operations of one pack: forward, and backward with the unit-gradient head and recomputation if asked.

    shared: the layout is one pass over shared prompts, else an ordinary pass per completion. given: so many tokens of the
    completions are no targets.
    """
    tokens = sum(prompt + sum(completions) for prompt, completions in layout)
    rows = sum(sum(completions) for _, completions in layout) - given
    left_out = (
        tokens - sum(1 + sum(completions) - len(completions) for _, completions in layout) if shared else 0
    )
    linear = 2 * tokens * (shape.frozen_weights + shape.trained_weights + shape.adapter_weights)
    linear -= 2 * left_out * (shape.last_frozen + shape.last_trained)
    attention = 4 * visible_pairs(layout) * shape.attention_width
    head = 2 * rows * shape.head_weights
    flops = linear + attention + head + images * shape.vision_per_image
    if backward:
        flops += 2 * tokens * (shape.frozen_weights + 2 * (shape.trained_weights + shape.adapter_weights))
        flops -= 2 * left_out * (shape.last_frozen + 2 * shape.last_trained)
        if not shape.embeddings_trained and not (images and shape.projector_backward_per_image):
            flops -= 2 * tokens * shape.fed_by_embeddings
        flops += attention * 5 // 2
        flops += 3 * head if shape.head_trained else head  # recompute, dH and dW; or the unit gradient
        flops += linear + attention - 2 * tokens * shape.not_recomputed if checkpointing else 0
        flops += images * shape.projector_backward_per_image
    return flops
