"""Gradient checkpointing of the decoder's layers, and of nothing else."""

from __future__ import annotations

from typing import Any

from fasttrain.errors import UserError
from fasttrain.model.lora import language_model


def checkpoint_decoder(model: Any) -> None:
    """Recompute each decoder layer in the backward pass.

    transformers' own switch on a whole LLaVA also checkpoints the frozen vision tower and lets its embeddings require
    gradients, so that every backward pass runs through the tower and throws the result away. Non-reentrant checkpointing
    needs no gradient at a layer's input, so the decoder's embeddings are left as they are too.
    """
    decoder: Any = language_model(model)
    enable = getattr(decoder, "activation_checkpointing_enable", None)
    if enable is None or not getattr(decoder, "supports_gradient_checkpointing", False):
        raise UserError(
            f"train.gradient_checkpointing: {type(model).__name__} does not support it; set it to false"
        )
    enable({"use_reentrant": False})
    if getattr(decoder, "_require_grads_hooks", None):
        decoder.disable_input_require_grads()
