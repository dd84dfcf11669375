"""Weights in bitsandbytes' 4 bits: which linears of a model are quantised, and what stays whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttrain.config import ModelConfig
from fasttrain.errors import UserError
from fasttrain.model.lora import PROJECTORS
from fasttrain.progress import say


def nf4_settings(
    loader: Any,
    config: ModelConfig,
    model_config: Any,
    has_images: bool,
    dtype: torch.dtype,
    replaced: Sequence[str],
) -> Any:
    """What bitsandbytes shall quantise, None for nothing: all linears but the ones that transformers leaves out, `patch_embeddings`, and
    what is replaced."""
    if config.quantize is None:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"model.quantize: {config.quantize} needs bitsandbytes: pip install 'fasttrain-dpo[quant]'"
        ) from None
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    names = [*replaced, *(PROJECTORS if config.train_projector else ())]
    left_out = None  # as transformers says
    if names or has_images:
        with torch.device("meta"):
            model = loader.from_config(
                copy.deepcopy(model_config), dtype=dtype, trust_remote_code=config.trust_remote_code
            )
        names += patch_embeddings(model)
        left_out = get_keys_to_not_convert(model) + [rf"(?:.*\.)?{re.escape(name)}" for name in names]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=left_out,  # for all its name of 4 bits too
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def patch_embeddings(model: Any) -> list[str]:
    """Names of the linears that take an image's patches: transformers casts pixels to their weights' type, of quantised ones to uint8."""
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if re.search("(Patch|Vision)Embed", type(module).__name__)
        for child, linear in module.named_children()
        if isinstance(linear, nn.Linear)
    ]


def is_quantised(module: nn.Module) -> bool:
    """Whether bitsandbytes takes a module of this class, if its name is not left out: no class that builds on a linear."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or type(module) is nn.Linear


def check_quantised(model: Any, folder: Path, wanted: bool) -> None:
    """Refuse quantised weights that take patches, and nothing quantised where that is wanted; tell where most weights stay whole."""
    for name in patch_embeddings(model):
        if not (weight := model.get_parameter(f"{name}.weight")).is_floating_point():
            raise UserError(
                f"model.name: wanted {name}, to whose type pixels are cast, unquantised in {folder}, got {weight.dtype}"
            )
    if not wanted:
        return
    packed = sum(p.quant_state.shape.numel() for p in model.parameters() if getattr(p, "quant_state", None))
    if not packed:
        raise UserError(
            f"model.quantize: wanted null for {type(model).__name__}, which has no linear that bitsandbytes quantises, got nf4"
        )
    ends = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    whole = sum(p.numel() for p in model.parameters() if p.is_floating_point() and id(p) not in ends)
    if whole > packed:
        say(
            f"note: model.quantize: {packed:,} weights are quantised, {whole:,} beside the embeddings stay whole: bitsandbytes takes "
            "linears only, not what a mixture's experts are here"
        )
