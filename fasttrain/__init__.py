"""Direct Preference Optimization for vision-language models, fast and exact.

`train_dpo(load_config("recipe.yaml"))` is what `fasttrain dpo -c recipe.yaml` runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DPOConfig", "RunResult", "UserError", "load_config", "train_dpo", "train_sft"]

if TYPE_CHECKING:
    from fasttrain.config import DPOConfig, load_config
    from fasttrain.errors import UserError
    from fasttrain.train.loop import RunResult, train_dpo, train_sft

_HOME = {
    "DPOConfig": "fasttrain.config",
    "load_config": "fasttrain.config",
    "UserError": "fasttrain.errors",
    "RunResult": "fasttrain.train.loop",
    "train_dpo": "fasttrain.train.loop",
    "train_sft": "fasttrain.train.loop",
}


def __getattr__(name: str) -> Any:
    # Imported on use: `fasttrain --help` must not wait for torch.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fasttrain' has no attribute {name!r}")
