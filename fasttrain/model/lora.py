"""Which parameters train: a LoRA adapter through peft, the whole language model, the projector."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from fasttrain.config import LoraConfig
from fasttrain.errors import UserError

PROJECTOR = "multi_modal_projector"


def language_model(model: Any) -> nn.Module:
    """The decoder without vision tower, projector and head."""
    base = model.base_model
    return getattr(base, "language_model", base)


def auto_targets(model: Any) -> str:
    """A regular expression for every linear of the language model, as peft's target_modules."""
    decoder = language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    names = {name for name, module in decoder.named_modules() if _is_linear(module)}
    if not names:
        raise UserError("lora.targets: wanted linear layers in the language model, found none; name them")
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    return rf"{re.escape(prefix)}\..*\.({'|'.join(leaves)})"


def _is_linear(module: nn.Module) -> bool:
    # bitsandbytes' quantised linears are subclasses; GPT-2's Conv1D is a linear by another name
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def attach_lora(model: Any, lora: LoraConfig, train_projector: bool) -> Any:
    """The model with a fresh adapter, or with the one of `init_from`; a PeftModel. Adapter weights have the model's dtype."""
    import peft

    if lora.init_from is not None:
        return _load_adapter(model, lora, train_projector)
    targets = auto_targets(model) if lora.targets == "auto" else lora.targets
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none",
        task_type="CAUSAL_LM", modules_to_save=[PROJECTOR] if train_projector else None,
    )  # fmt: skip
    try:
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"lora.targets: {str(error).splitlines()[0]}") from None
    if any("lm_head" in name for name in adapted.targeted_module_names):
        raise UserError(
            "lora.targets: wanted layers below the head, got lm_head: an adapter on the head is not offered"
        )
    return adapted


def _load_adapter(model: Any, lora: LoraConfig, train_projector: bool) -> Any:
    import peft

    folder = Path(str(lora.init_from))
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"lora.init_from: wanted a folder with adapter_config.json and adapter_model.safetensors, got {folder}"
        )
    config = peft.PeftConfig.from_pretrained(folder)
    if config.peft_type != "LORA":
        raise UserError(f"lora.init_from: wanted a LoRA adapter, got {config.peft_type}")
    for name, theirs in (("rank", config.r), ("alpha", config.lora_alpha)):
        wanted = getattr(lora, name)
        if wanted is not None and wanted != theirs:
            raise UserError(f"lora.{name}: wanted the adapter's {theirs} (or no value), got {wanted}")
    if lora.targets not in (None, "auto") and not _same_targets(lora.targets, config.target_modules):
        raise UserError(f"lora.targets: wanted the adapter's own (or no value), got {lora.targets}")
    if train_projector and PROJECTOR not in (config.modules_to_save or []):
        raise UserError(
            "lora.init_from: wanted an adapter that holds the projector, since model.train_projector is true"
        )
    config.lora_dropout = lora.dropout
    config.inference_mode = False
    return peft.PeftModel.from_pretrained(
        model, folder, config=config, is_trainable=True, autocast_adapter_dtype=False
    )


def _same_targets(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str) or isinstance(theirs, str):
        return bool(ours == theirs)
    return set(ours) == set(theirs)


def choose_trainable(model: Any, adapted: Any | None, train_projector: bool) -> None:
    """Set requires_grad: the adapter (peft has done it), or the language model and head, and the projector."""
    has_projector = any(PROJECTOR in name for name, _ in model.named_modules())
    if train_projector and not has_projector:
        raise UserError(
            "model.train_projector: wanted a vision-language model, got a model without projector"
        )
    if adapted is not None:
        return
    model.requires_grad_(False)
    language_model(model).requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    if train_projector:
        for name, parameter in model.named_parameters():
            if PROJECTOR in name:
                parameter.requires_grad_(True)
