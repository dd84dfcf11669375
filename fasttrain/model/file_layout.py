"""Weights whose axes transformers turns while it loads them, under ZeRO-3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fasttrain.ranks import full_shape


@contextlib.contextmanager
def whole_shapes() -> Iterator[None]:
    """Have shapes in files compared with those of whole weights: Qwen3-VL-MoE's experts lie in two ways, and transformers turns
    those that do not fit the model's, where ZeRO-3 has left nothing of the shape."""
    from transformers.core_model_loading import Transpose

    turn = Transpose.convert

    def convert(
        self: Transpose, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **given: Any
    ) -> dict[str, Tensor]:  # fmt: skip
        if self.check_dims:
            found = next(iter(input_dict.values()))
            tensor: Tensor = found[0] if isinstance(found, list) else found
            if tensor.shape == full_shape(given["model"].get_parameter(given["full_layer_name"])):
                return {self.get_target_pattern(input_dict, source_patterns, target_patterns): tensor}
        turned: dict[str, Tensor] = turn(self, input_dict, source_patterns, target_patterns, **given)
        return turned

    Transpose.convert = convert
    try:
        yield
    finally:
        Transpose.convert = turn
