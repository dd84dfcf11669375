"""DeepSpeed behind the engine's seam: ZeRO-2 and ZeRO-3, with the numbers of one process."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.config import DPOConfig
from fasttrain.data.batch import PackBatch
from fasttrain.errors import UserError
from fasttrain.model.checkpointing import checkpoint_decoder
from fasttrain.model.policy import Policy
from fasttrain.ranks import full_shape, ranks
from fasttrain.train.engine import TrainedState
from fasttrain.train.optimizer import make_optimizer, parameter_groups, trainable_parameters
from fasttrain.train.tensor_file import Entry, TensorStream

MOMENTS = ("exp_avg", "exp_avg_sq")
# What the recipe decides; a deepspeed_config that says otherwise would train something else than the recipe.
_OURS = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu",
         "gradient_accumulation_steps", "gradient_clipping", "fp16", "bf16", "managed_gradient_accumulation")  # fmt: skip


def import_deepspeed() -> Any:
    """The package, without its C++ extension for shared memory, which it would compile at every first start."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError:
        raise UserError(
            "distributed.zero_stage: needs DeepSpeed: pip install 'fasttrain-dpo[deepspeed]'"
        ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def alone_as_a_rank() -> None:
    """Say in the environment what a launcher says, for one process without a launcher: DeepSpeed wants a group."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


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
    return settings


def _read_settings(name: str, stage: int | None) -> dict[str, Any]:
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
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


def _device(settings: dict[str, Any], offload: str) -> str:
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


class ZeroEngine:
    """Every rank holds a part of the optimizer's state (ZeRO-2), and of the weights too (ZeRO-3)."""

    def __init__(self, policy: Policy, config: DPOConfig, checkpointing: bool) -> None:
        deepspeed = import_deepspeed()
        self.policy, self.stage = policy, config.distributed.zero_stage
        if checkpointing:
            checkpoint_decoder(policy.model)
        named = trainable_parameters(policy)
        groups = parameter_groups(named, config.train)
        policy.head.gathered_once = self.stage == 3 and not policy.head.weight.requires_grad
        settings = deepspeed_settings(config, policy.model.dtype)
        self.offloaded = _device(settings, "offload_optimizer") != "none"
        # torch's AdamW runs offloaded states too, where they lie, with the same numbers as anywhere else; DeepSpeed's own for
        # the CPU is compiled at the first start and rounds its bias correction in fp32
        optimizer = make_optimizer(groups, config.train.optimizer)
        self.engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
        self.optimizer: TrainedState = ZeroState(self.engine, named, self.stage)

    def forward(self, batch: PackBatch, **wants: bool) -> Any:
        """The head's output for the batch's rows."""
        return self.engine(batch, **wants)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * ranks().size)  # DeepSpeed takes the mean over the ranks

    def step(self, factor: float) -> Tensor:
        """Update with the reduced gradients; their norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.engine.step()
        self._forget_gradients()
        return torch.as_tensor(
            self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.policy.device
        )

    def _forget_gradients(self) -> None:
        """Zero DeepSpeed's buffers: what the next step gives no gradient would keep this one's."""
        inner = self.engine.optimizer
        if self.stage == 3:
            inner.grad_partitions_flat_buffer.zero_()
        if not self.offloaded:
            return
        inner.norm_for_param_grads.clear()
        gradients = [flat.grad for flat in flat_masters(self.engine, self.stage) if flat.grad is not None]
        for buffer in [*gradients, *getattr(inner, "accumulated_grads_in_cpu", {}).values()]:
            buffer.zero_()


def flat_masters(engine: Any, stage: int | None) -> list[Tensor]:
    """This rank's part of the trained weights, in fp32, a flat tensor per group."""
    inner = engine.optimizer
    return list(inner.fp32_partitioned_groups_flat if stage == 3 else inner.single_partition_of_fp32_groups)


class ZeroState:
    """The trained weights and the optimizer's moments as whole tensors, gathered one at a time.

    Every rank must call and iterate; only the first keeps what is gathered, until the next comes, so that a model whose state
    fits on no rank can be saved.
    """

    def __init__(self, engine: Any, named: list[tuple[str, torch.nn.Parameter]], stage: int | None) -> None:
        self.engine, self.named, self.stage = engine, named, stage
        self.names = [name for name, _ in named]

    def weights(self) -> TensorStream:
        """The trained parameters in fp32, by name."""
        entries = [Entry(name, torch.float32, tuple(full_shape(p))) for name, p in self.named]
        return TensorStream(entries, self._gathered(None))

    def state(self) -> tuple[TensorStream, dict[str, Any]]:
        step = self._step()
        if step is None:
            return TensorStream.of({}), {}
        self._link_moments()
        moments = [
            Entry(f"{name}/{moment}", torch.float32, tuple(full_shape(parameter)))
            for moment in MOMENTS
            for name, parameter in self.named
        ]
        steps = [Entry(f"{name}/step", torch.float32, ()) for name in self.names]
        values = itertools.chain(*map(self._gathered, MOMENTS), itertools.repeat(step, len(steps)))
        return TensorStream(moments + steps, values), {}

    def _gathered(self, moment: str | None) -> Iterator[Tensor | None]:
        """Each trained weight, or its moment, whole on the first rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for _, parameter in self.named:
            whole = (
                safe_get_full_fp32_param(parameter)
                if moment is None
                else safe_get_full_optimizer_state(parameter, moment)
            )
            yield whole.detach().float().view(full_shape(parameter)) if ranks().main else None

    def _link_moments(self) -> None:
        """Tell ZeRO-2's parameters where their moments are: it links all groups when only the first has been updated."""
        if self.stage != 3 and self._step() is not None:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self) -> list[Tensor]:
        return flat_masters(self.engine, self.stage)

    def _step(self) -> Tensor | None:
        """How many updates were made; None before the first."""
        for flat in self._flat():
            state = self.engine.optimizer.optimizer.state.get(flat, {})
            if "step" in state:
                return torch.as_tensor(state["step"], dtype=torch.float32)
        return None

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        import deepspeed

        for name, parameter in self.named:
            whole = tensors[name]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.data.copy_(whole)
            self._put(parameter, whole, None)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> None:
        first = f"{self.names[0]}/step"
        if first not in tensors:
            return
        for flat in self._flat():
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self.engine.optimizer.optimizer.state[flat] = {
                "step": tensors[first].to(flat.device, copy=True), **zeros,
            }  # fmt: skip
        self._link_moments()
        for name, parameter in self.named:
            for moment in MOMENTS:
                self._put(parameter, tensors[f"{name}/{moment}"], moment)

    def _put(self, parameter: Any, value: Tensor, moment: str | None) -> None:
        """Write this rank's part of a whole fp32 tensor."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        value = value.to(self.engine.device, torch.float32).flatten()
        if self.stage != 3:
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
            return
        part = (
            safe_get_local_fp32_param(parameter)
            if moment is None
            else safe_get_local_optimizer_state(parameter, moment)
        )
        size, rank = part.numel(), ranks().rank
        padded = torch.nn.functional.pad(value, (0, max(0, size * ranks().size - value.numel())))
        part.data.copy_(padded[size * rank : size * (rank + 1)].view_as(part))
