"""What model families want besides token ids and images: positions on several axes, token types, spans seen both ways.

One seam for all of them, from what a model and its processor say of themselves. It runs in the worker processes that make
packs, so it touches configurations and CPU tensors only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.model.head import trunk

# Families whose prompts are not seen causally: the tokens of an image see each other, or all of the prompt does.
_BOTH_WAYS = {"gemma3": "images", "paligemma": "prompt"}

ImageInputs = dict[str, Tensor]


def sees_prompts_whole(model_config: Any) -> bool:
    """Whether every token of a prompt sees all others, so that what is said later changes what was said before."""
    return _BOTH_WAYS.get(model_config.model_type) == "prompt"


class FamilyInputs:
    """The other arguments of a family's forward, for packs of shared prompts and for ordinary sequences."""

    def __init__(self, model: Any, processor: Any) -> None:
        base = trunk(model)
        self._accepts = set(inspect.signature(base.forward).parameters)
        self._processor = processor
        self._types_name = self._name_of_types()
        self._rope_index = getattr(base, "get_rope_index", None)
        self._both_ways = _BOTH_WAYS.get(model.config.model_type)
        self._image_token_id = getattr(model.config, "image_token_id", None)

    def positions(
        self, groups: Sequence[tuple[np.ndarray, Sequence[int], ImageInputs | None]]
    ) -> Tensor | None:
        """Positions (axes, T) of a pack of (prompt ids, completion lengths, image inputs), None where one axis does.

        A completion continues on every axis after the prompt's last position.
        """
        if self._rope_index is None or not any(images for _, _, images in groups):
            return None
        found = [self._prompt_positions(ids, images) for ids, _, images in groups]
        axes = max(len(positions) for positions in found)
        parts = []
        for (_, lengths, _), positions in zip(groups, found, strict=True):
            positions = positions.expand(axes, -1)
            after = int(positions.max()) + 1
            parts.append(positions)
            parts += [torch.arange(after, after + length).expand(axes, -1) for length in lengths]
        return torch.cat(parts, dim=1)

    def _prompt_positions(self, ids: np.ndarray, images: ImageInputs | None) -> Tensor:
        if not images:
            return torch.arange(len(ids))[None]
        assert self._rope_index is not None
        wanted = inspect.signature(self._rope_index).parameters
        ids_1T = torch.from_numpy(ids.astype(np.int64))[None]
        inputs = {**images, **self.token_types(ids), "attention_mask": torch.ones_like(ids_1T)}
        inputs = {name: value for name, value in inputs.items() if name in wanted}
        positions: Tensor = self._rope_index(input_ids=ids_1T, **inputs)[0]
        return positions[:, 0]

    def spans(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Parts (start, stop) of a prompt whose tokens also see the part's later tokens."""
        if self._both_ways is None:
            return []
        if self._both_ways == "prompt":
            return [(0, len(ids))]
        inside = np.concatenate([[0], ids == self._image_token_id, [0]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(inside))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    def sequence(self, ids: np.ndarray, images: ImageInputs | None, prompt: int) -> ImageInputs:
        """What the processor would return besides ids, mask and images for one ordinary sequence whose prompt is so long."""
        inputs = {**self.token_types(ids), **self.expert_types(ids)}
        if self._both_ways == "prompt":  # its tokens are of type 0, and see each other
            inputs["token_type_ids"] = (torch.arange(len(ids)) >= prompt).long()[None]
        if images and self._rope_index is not None and self._types_name is None:
            # without a mask Qwen-Omni's forward makes positions on one axis only
            inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        if images and "cross_attention_mask" in self._accepts:
            inputs["cross_attention_mask"] = self._cross_attention_mask(ids, images)
        return inputs

    def _cross_attention_mask(self, ids: np.ndarray, images: ImageInputs) -> Tensor:
        """Which tiles every token sees (1, T, images, tiles), by the functions that Mllama's processor uses."""
        from transformers.models.mllama.processing_mllama import (
            convert_sparse_cross_attention_mask_to_dense,
            get_cross_attention_token_mask,
        )

        tiles = images["aspect_ratio_mask"]
        spans = get_cross_attention_token_mask(ids.tolist(), self._processor.image_token_id)
        counts = [row.sum(-1).tolist() for row in tiles]
        mask = convert_sparse_cross_attention_mask_to_dense([spans], counts, tiles.shape[-1], len(ids))
        return torch.from_numpy(mask)

    def token_types(self, ids: np.ndarray) -> ImageInputs:
        """Which tokens are an image's, (1, T), by the name that the model knows; nothing for most families."""
        if self._types_name is None:
            return {}
        types = self._processor.create_mm_token_type_ids([ids.tolist()])
        return {self._types_name: torch.tensor(types)}

    def expert_types(self, ids: np.ndarray) -> ImageInputs:
        """Which tokens go to the experts of images, (1, T), where a family has some (Ernie 4.5 VL)."""
        name = "moe_mm_token_type_ids"
        if name not in self._accepts:
            return {}
        return {name: torch.from_numpy(self._processor.create_moe_mm_token_type_ids(ids[None]))}

    def _name_of_types(self) -> str | None:
        names = ("mm_token_type_ids", "token_type_ids")
        returned = getattr(self._processor, "return_mm_token_type_ids", False)  # if not told otherwise
        if not returned and names[0] not in getattr(self._processor, "model_input_names", ()):
            return None
        return next((name for name in names if name in self._accepts), None)
