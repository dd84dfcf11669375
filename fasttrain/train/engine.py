"""The one seam between the loop and whatever runs the optimizer: forward, backward, step, state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttrain.config import DPOConfig, TrainConfig
from fasttrain.data.batch import PackBatch
from fasttrain.errors import UserError
from fasttrain.model.checkpointing import checkpoint_decoder
from fasttrain.model.policy import Policy
from fasttrain.ranks import start_ranks
from fasttrain.train.optimizer import MasterOptimizer
from fasttrain.train.tensor_file import TensorStream


class TrainedState(Protocol):
    """The trained weights and the optimizer's state by name: whole tensors, made one at a time, kept on the first rank.

    What is loaded is read one at a time too.
    """

    names: list[str]

    def weights(self) -> TensorStream: ...
    def state(self) -> tuple[TensorStream, dict[str, Any]]: ...
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None: ...
    def load_state(self, tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> None: ...


class Engine(Protocol):
    """What runs a policy's passes and its optimizer. Every rank makes the same calls in the same order."""

    policy: Policy
    optimizer: TrainedState

    def forward(self, batch: PackBatch, **wants: bool) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, factor: float) -> Tensor: ...
    def close(self) -> None: ...


def make_engine(policy: Policy, config: DPOConfig, checkpointing: bool) -> Engine:
    """Plain torch, or DeepSpeed when the recipe names a ZeRO stage."""
    if config.distributed.zero_stage is None:
        return TorchEngine(policy, config.train, checkpointing)
    from fasttrain.train.zero_engine import ZeroEngine

    engine = ZeroEngine(policy, config, checkpointing)
    with engine.within_a_pass():
        try:
            policy.check()
        except UserError as error:
            if config.distributed.zero_stage != 3:
                raise
            raise UserError(
                f"{error}; distributed.zero_stage: 3 leaves every rank a part of each weight between modules, 2 leaves them whole"
            ) from error
        policy.check_images()
    return engine


def join_ranks(config: DPOConfig) -> None:
    """Join the processes that a launcher started; DeepSpeed wants a group even of one."""
    if config.distributed.zero_stage is not None:
        from fasttrain.train.zero_engine import alone_as_a_rank, import_deepspeed

        alone_as_a_rank()
        import_deepspeed()
    start_ranks()


def check_engine(config: DPOConfig, dtype: torch.dtype) -> None:
    """UserError for settings that the recipe's engine would refuse."""
    if config.distributed.zero_stage is not None:
        from fasttrain.train.deepspeed_settings import deepspeed_settings

        deepspeed_settings(config, dtype)


def partitioned_loading(config: DPOConfig, dtype: torch.dtype) -> Any:
    """While the result lives, transformers builds and loads models as ZeRO-3 parts, a file at a time."""
    from transformers.integrations import HfDeepSpeedConfig

    from fasttrain.train.deepspeed_settings import deepspeed_settings

    return HfDeepSpeedConfig(deepspeed_settings(config, dtype))


class TorchEngine:
    """Plain torch; several ranks hold the same weights and add up their gradients before the update."""

    optimizer: TrainedState

    def __init__(self, policy: Policy, config: TrainConfig, checkpointing: bool) -> None:
        self.policy = policy
        if checkpointing:
            checkpoint_decoder(policy.model)
        self._masters = MasterOptimizer(policy, config)
        self.optimizer = self._masters

    def forward(self, batch: PackBatch, **wants: bool) -> Any:
        """The head's output for the batch's rows."""
        return self.policy(batch, **wants)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:  # a pack without images where only the tower or the projector trains
            return
        loss.backward()  # type: ignore[no-untyped-call]
        self._masters.gather_gradients()

    def step(self, factor: float) -> Tensor:
        """Update with the gathered gradients; their norm before clipping, on the device."""
        return self._masters.step(factor)

    def close(self) -> None:
        """Nothing outlives the engine."""
