"""Keeps transformers from asking the device a question in every pass: each stops the host until the device has caught up."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaModel


def trust_placeholders(model: Any) -> None:
    """LLaVA compares the numbers of placeholders and image features in every pass; both are fixed per image, so that a pass in
    which they agreed is enough. Other families, whose images differ in tokens, keep their check.
    """
    inner = model.base_model
    if type(inner) is LlavaModel:
        inner.get_placeholder_mask = MethodType(_placeholder_mask, inner)


def _placeholder_mask(self: Any, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
    mask: Tensor = (input_ids == self.config.image_token_id).unsqueeze(-1)
    return mask
