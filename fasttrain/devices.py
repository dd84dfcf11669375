"""Where a model runs and in which type, where the recipe leaves that to us."""

from __future__ import annotations

import torch


def pick_device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """What the recipe says; bfloat16 where it leaves the choice to a GPU that computes in it: a T4 goes through float32."""
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
