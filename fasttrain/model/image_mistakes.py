"""What a model's own code raises over what its processor made of images, in one line."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import transformers
from torch import Tensor

from fasttrain.errors import UserError, is_out_of_memory
from fasttrain.model.folder import in_one_line


@contextlib.contextmanager
def image_mistakes(model: Any, ids_T: Tensor, images: int, passed: bool) -> Iterator[None]:
    """UserError where the block's pass over so many images fails in the model's own code.

    Another number of features than placeholders is told at any time, what else it raises until a pass with images has `passed`.
    """
    try:
        yield
    except Exception as error:
        if not images or isinstance(error, UserError) or is_out_of_memory(error) or not _raised_there(error):
            raise
        if isinstance(error, ValueError) and "image tokens" in str(error).lower():
            written = int((ids_T == model.config.image_token_id).sum()) // images
            raise UserError(
                f"model.name: the processor writes {written} tokens for an image, the model makes another number of features: "
                "the processor's settings (vision_feature_select_strategy, patch_size, num_additional_image_tokens, image sizes) "
                "do not fit config.json"
            ) from None
        if passed:
            raise
        raise UserError(
            f"model.name: {type(model).__name__}, as transformers {transformers.__version__} has it, fails on the first images: "
            f"{in_one_line(error)}; do the processor's settings fit config.json?"
        ) from error


def _raised_there(error: Exception) -> bool:
    """Whether what failed was called by the model's code: neither ours nor DeepSpeed's, torch's aside."""
    names = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    callers = [name.partition(".")[0] for name in names]
    caller = next((name for name in reversed(callers) if name != "torch"), "")
    return caller not in ("fasttrain", "fasttrain_kernels", "deepspeed")
