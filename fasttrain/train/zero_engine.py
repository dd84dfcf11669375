"""DeepSpeed behind the engine's seam: ZeRO-2 and ZeRO-3, with the numbers of one process."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasttrain.config import DPOConfig
from fasttrain.data.batch import PackBatch
from fasttrain.errors import UserError
from fasttrain.model.checkpointing import checkpoint_decoder
from fasttrain.model.lora import language_model
from fasttrain.model.policy import Policy
from fasttrain.plan.memory import REDUCE_BUCKET
from fasttrain.ranks import full_shape, launched, ranks
from fasttrain.train.deepspeed_settings import deepspeed_settings, offload_device
from fasttrain.train.engine import TrainedState
from fasttrain.train.optimizer import make_optimizer, parameter_groups, trainable_parameters
from fasttrain.train.zero_state import ZeroState, flat_masters


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
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if launched() > 1 or all(os.environ.get(name) for name in names):
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


def _gather_experts_whole(policy: Policy) -> None:
    """Have an adapter on a mixture's fused experts gathered with what it wraps, for as long as the whole of it runs: peft reads it
    in a module that it makes anew in every pass, without DeepSpeed's hooks."""
    from deepspeed.utils import set_z3_leaf_modules
    from peft.tuners.lora.layer import ParamWrapper

    if any(isinstance(module, ParamWrapper) for module in policy.modules()):
        set_z3_leaf_modules(policy, [ParamWrapper])
        policy.model.enable_input_require_grads()  # else the first layer's would be let go before its gradients are made


class ZeroEngine:
    """Every rank holds a part of the optimizer's state (ZeRO-2), and of the weights too (ZeRO-3)."""

    def __init__(self, policy: Policy, config: DPOConfig, checkpointing: bool) -> None:
        deepspeed = import_deepspeed()
        self.policy, self.stage = policy, config.distributed.zero_stage
        if checkpointing:
            checkpoint_decoder(policy.model)
        named = trainable_parameters(policy)
        groups = parameter_groups(policy, named, config.train)
        policy.head.gathered_once = self.stage == 3 and not policy.head.weight.requires_grad
        settings = deepspeed_settings(config, policy.model.dtype)
        # DeepSpeed lays out its buckets whole, 5 x 10^8 elements each, however few train
        trained = sum(full_shape(parameter).numel() for _, parameter in named)
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(REDUCE_BUCKET, trained))
        self.offloaded = offload_device(settings, "offload_optimizer") != "none"
        # torch's AdamW runs offloaded states too, where they lie, with the same numbers as anywhere else; DeepSpeed's own for
        # the CPU is compiled at the first start and rounds its bias correction in fp32
        optimizer = make_optimizer(groups, config.train)
        if self.stage == 3:
            _gather_experts_whole(policy)
        self.engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
        eight_bit = config.train.optimizer == "adamw_8bit"
        self.optimizer: TrainedState = ZeroState(self.engine, named, self.stage, eight_bit)

    @contextlib.contextmanager
    def within_a_pass(self) -> Iterator[None]:
        """Have weights gathered that a module reads of another, as DeepSpeed does in the policy's own passes: in towers and projectors
        (positions, a pooling attention's output); in the decoder and the head for Gemma 4 alone, as what is read of them between
        modules is never let go."""
        modules = list(self.policy.modules()) if self.stage == 3 else []
        if self.policy.embeddings_of_layers is None:
            decoder = {*language_model(self.policy.model).modules(), self.policy.head}
            modules = [module for module in modules if module not in decoder]
        for module in modules:
            module._parameters._in_forward = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in modules:
                module._parameters._in_forward = False  # type: ignore[attr-defined]

    def forward(self, batch: PackBatch, **wants: bool) -> Any:
        """The head's output for the batch's rows."""
        return self.engine(batch, **wants)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise UserError(
                "lora.targets: wanted something to train that the answers depend on, got nothing with a gradient in this pass"
            )
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

    def close(self) -> None:
        """Take DeepSpeed's hooks off the weights: they would keep the model and its buffers as long as the process lives."""
        self.engine.destroy()

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
