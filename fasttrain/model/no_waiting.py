"""LLaVA's images put into its text without asking the device anything: each answer stops the host until the device is there."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaModel


def images_are_alike(trunk: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether a model makes as many features of any image: one pass in which they agreed with the placeholders is then enough.

    So it is for LLaVA over towers of one image size; not for Pixtral, which is a LlavaModel too and is told `image_sizes`, nor for
    other families, which keep transformers' comparison in every pass.
    """
    return type(trunk) is LlavaModel and "pixel_values" in inputs and "image_sizes" not in inputs


def embed_with_images(trunk: Any, ids_T: Tensor, pixel_values: Tensor) -> Tensor:
    """(1, T, D), features in place of image tokens, as LlavaModel makes them.

    transformers compares the numbers of the two in every pass, and the gradient of its `masked_scatter` counts the mask.
    """
    embedded_TD = trunk.get_input_embeddings()(ids_T[None])[0]
    found = trunk.get_image_features(pixel_values=pixel_values, return_dict=True)
    features_FD = torch.cat(tuple(found.pooler_output)).to(embedded_TD.dtype)
    other_T = ids_T != trunk.config.image_token_id
    rows_F = other_T.argsort(stable=True)[: len(features_FD)]  # as many as there are features: no need to ask
    return embedded_TD.index_copy(0, rows_F, features_FD)[None]


def trust_placeholders(trunk: Any) -> None:
    """Leave out the comparison where LlavaModel's own forward has to run; the gradient of its `masked_scatter` waits still."""
    trunk.get_placeholder_mask = MethodType(_placeholder_mask, trunk)


def _placeholder_mask(self: Any, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
    mask: Tensor = (input_ids == self.config.image_token_id).unsqueeze(-1)
    return mask
