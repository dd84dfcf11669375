"""DeepSpeed's JSON: ours, with the recipe's `deepspeed_config` merged over it, and what is refused there."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import torch

from fasttrain.config import DPOConfig
from fasttrain.errors import UserError, did_you_mean
from fasttrain.files import user_path

# What the recipe decides; a deepspeed_config that says otherwise would train something else than the recipe.
_OURS = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu",
         "gradient_accumulation_steps", "gradient_clipping", "fp16", "bf16", "managed_gradient_accumulation")  # fmt: skip
# What it may say besides: how ZeRO moves things, and what DeepSpeed tells of itself.
_THEIRS = ("zero_optimization", "communication_data_type", "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
           "dump_state", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")  # fmt: skip
# Parts of zero_optimization that round, or that checkpoints and the clearing of gradients do not know.
_UNTRIED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "zeropp_loco_param",
            "zenflow", "cpu_offload", "cpu_offload_param")  # fmt: skip


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
        _check_by_deepspeed(settings, config.distributed.deepspeed_config)
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
    found = _said(found)
    ours = [key for key in found if key in _OURS]
    if ours:
        raise UserError(
            f"distributed.deepspeed_config: {name}: {', '.join(ours)} {'is' if len(ours) == 1 else 'are'} set by the recipe; "
            f"remove {'it' if len(ours) == 1 else 'them'} there"
        )
    for key in found:
        if key not in _THEIRS:
            raise UserError(
                f"distributed.deepspeed_config: {name}: wanted any of {', '.join(_THEIRS)}, got {key}"
                f"{did_you_mean(key, list(_THEIRS))}"
            )
    every = found.get("steps_per_print", 1)
    if type(every) is not int or every < 1:  # DeepSpeed divides by it at the first step
        raise UserError(
            f"distributed.deepspeed_config: {name}: steps_per_print: wanted an integer of at least 1, got {json.dumps(every)}"
        )
    zero = found.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(
            f"distributed.deepspeed_config: {name}: zero_optimization: wanted a JSON object, got {json.dumps(zero)}"
        )
    theirs = zero.get("stage", stage)
    if theirs != stage:
        raise UserError(
            f"distributed.deepspeed_config: {name}: wanted zero_optimization.stage {stage} as "
            f"distributed.zero_stage, got {theirs}"
        )
    for key in _UNTRIED:
        if zero.get(key):
            raise UserError(
                f"distributed.deepspeed_config: {name}: zero_optimization.{key} has never been run here; remove it there"
            )
    _check_offload(zero, name, stage)
    return found


def _said(found: dict[str, Any]) -> dict[str, Any]:
    """What a file says: not `auto`, the Hugging Face Trainer's word for "you decide", null, or a section that is switched off."""
    said = {}
    for key, value in found.items():
        if isinstance(value, dict):
            on = value.get("enabled", True)
            # bf16 switched off does say something: another precision than the recipe's may be
            if on == "auto" or (on is False and key != "bf16"):
                continue
            value = _said(value)
        if value not in ("auto", None):
            said[key] = value
    return said


def _check_by_deepspeed(settings: dict[str, Any], name: str) -> None:
    """UserError for what DeepSpeed refuses: it would say so in a traceback when the model is loaded."""
    if importlib.util.find_spec("deepspeed") is None:  # a plan needs no engine
        return
    from fasttrain.train.zero_engine import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *wrong["loc"])))
        raise UserError(
            f"distributed.deepspeed_config: {name}: {where}: {wrong['msg']}, got {wrong['input']!r}"
        ) from None
    except Exception as error:  # noqa: BLE001 (its checks raise errors of every kind)
        raise UserError(f"distributed.deepspeed_config: {name}: {' '.join(str(error).split())}") from None


def _check_offload(zero: dict[str, Any], name: str, stage: int | None) -> None:
    """UserError for what has not been run: states on a disk, and parameters that stage 2 does not part."""
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key, {}), dict):
            raise UserError(
                f"distributed.deepspeed_config: {name}: zero_optimization.{key}: wanted a JSON object, got {json.dumps(zero[key])}"
            )
        where = zero.get(key, {}).get("device", "none")
        if where not in ("none", "cpu"):
            raise UserError(
                f"distributed.deepspeed_config: {name}: zero_optimization.{key}.device: wanted cpu or none, got {where}"
            )
        if key == "offload_param" and where != "none" and stage != 3:
            raise UserError(
                f"distributed.deepspeed_config: {name}: zero_optimization.offload_param: wanted distributed.zero_stage 3, "
                f"whose parameters are in parts, got {stage}"
            )
    if zero.get("offload_optimizer", {}).get("super_offload"):
        raise UserError(
            f"distributed.deepspeed_config: {name}: zero_optimization.offload_optimizer.super_offload has never been run here; "
            "remove it there"
        )
    if zero.get("offload_optimizer", {}).get("ratio", 1.0) != 1.0:
        raise UserError(
            f"distributed.deepspeed_config: {name}: zero_optimization.offload_optimizer.ratio: wanted 1, all of the state "
            f"offloaded, got {zero['offload_optimizer']['ratio']}"
        )


def offload_device(settings: dict[str, Any], offload: str) -> str:
    """Where `offload_optimizer` or `offload_param` puts things; "none" if it does not."""
    return str((settings["zero_optimization"].get(offload) or {}).get("device", "none"))


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
