"""Keeps transformers from asking the device a question in every pass: each stops the host until the device has caught up."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaModel

_VISION = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")


def trust_placeholders(model: Any) -> None:
    """LLaVA compares the numbers of placeholders and image features in every pass; both are fixed per image, so that a pass in
    which they agreed is enough. Other families, whose images differ in tokens, keep their check.
    """
    inner = model.base_model
    if type(inner) is LlavaModel:
        inner.forward = MethodType(_forward, inner)


def _forward(
    self: Any, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs: Any
) -> Any:
    """LlavaModel's own, but for how features take the places of image tokens: the gradient of its `masked_scatter` waits too."""
    theirs = type(self).forward
    if input_ids is None or pixel_values is None:
        return theirs(self, input_ids=input_ids, pixel_values=pixel_values, **kwargs)
    vision = {name: kwargs.pop(name) for name in _VISION if name in kwargs}
    embedded_BTD = self.get_input_embeddings()(input_ids)
    found = self.get_image_features(pixel_values=pixel_values, **vision, **{**kwargs, "return_dict": True})
    features_FD = torch.cat(tuple(getattr(found, "pooler_output", found))).to(embedded_BTD.dtype)
    other = input_ids.flatten() != self.config.image_token_id
    rows_F = other.argsort(stable=True)[: len(features_FD)]  # as many as there are features: no need to ask
    merged = embedded_BTD.flatten(0, 1).index_copy(0, rows_F, features_FD).view_as(embedded_BTD)
    return theirs(self, inputs_embeds=merged, **kwargs)
