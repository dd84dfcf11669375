"""DeepSpeed's JSON: ours, with the recipe's `deepspeed_config` merged over it, and what is refused there."""

from __future__ import annotations

import json
from typing import Any

import torch

from fasttrain.config import DPOConfig
from fasttrain.errors import UserError
from fasttrain.files import user_path

# What the recipe decides; a deepspeed_config that says otherwise would train something else than the recipe.
_OURS = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu",
         "gradient_accumulation_steps", "gradient_clipping", "fp16", "bf16", "managed_gradient_accumulation")  # fmt: skip


def deepspeed_settings(config: DPOConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's JSON: ours, with the recipe's `deepspeed_config` merged over it."""
    stage = config.distributed.zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # a step has as many packs as it needs
        "gradient_clipping": config.train.grad_clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
        },
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if stage == 3:
        settings["zero_optimization"] |= {
            "stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9, "sub_group_size": 10**9,
        }  # fmt: skip
    if config.distributed.deepspeed_config is not None:
        _merge(settings, _read_settings(config.distributed.deepspeed_config, stage))
    if config.train.optimizer == "adamw_8bit" and offload_device(settings, "offload_optimizer") != "none":
        raise UserError(
            "train.optimizer: wanted adamw with zero_optimization.offload_optimizer, whose state costs the GPU nothing, got adamw_8bit"
        )
    return settings


def _read_settings(name: str, stage: int | None) -> dict[str, Any]:
    try:
        found = json.loads(user_path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"distributed.deepspeed_config: cannot read {name}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(
            f"distributed.deepspeed_config: {name}: wanted a JSON object, got {type(found).__name__}"
        )
    for key in _OURS:
        if found.get(key, "auto") != "auto":
            raise UserError(
                f"distributed.deepspeed_config: {name}: {key} is set by the recipe; remove it there"
            )
    theirs = (found.get("zero_optimization") or {}).get("stage", stage)
    if theirs != stage:
        raise UserError(
            f"distributed.deepspeed_config: {name}: wanted zero_optimization.stage {stage} as "
            f"distributed.zero_stage, got {theirs}"
        )
    _check_offload(found.get("zero_optimization") or {}, name, stage)
    return found


def _check_offload(zero: dict[str, Any], name: str, stage: int | None) -> None:
    """UserError for what has not been run: states on a disk, and parameters that stage 2 does not part."""
    for key in ("offload_optimizer", "offload_param"):
        where = (zero.get(key) or {}).get("device", "none")
        if where not in ("none", "cpu"):
            raise UserError(
                f"distributed.deepspeed_config: {name}: zero_optimization.{key}.device: wanted cpu or none, got {where}"
            )
        if key == "offload_param" and where != "none" and stage != 3:
            raise UserError(
                f"distributed.deepspeed_config: {name}: zero_optimization.offload_param: wanted distributed.zero_stage 3, "
                f"whose parameters are in parts, got {stage}"
            )
    if (zero.get("offload_optimizer") or {}).get("ratio", 1.0) != 1.0:
        raise UserError(
            f"distributed.deepspeed_config: {name}: zero_optimization.offload_optimizer.ratio: wanted 1, all of the state "
            f"offloaded, got {zero['offload_optimizer']['ratio']}"
        )


def offload_device(settings: dict[str, Any], offload: str) -> str:
    """Where `offload_optimizer` or `offload_param` puts things; "none" if it does not."""
    return str((settings["zero_optimization"].get(offload) or {}).get("device", "none"))


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if value == "auto":  # the Hugging Face Trainer's word for "you decide"
            continue
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
