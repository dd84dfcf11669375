"""The one seam between the loop and whatever runs the optimizer: forward, backward, step, state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttrain.config import TrainConfig
from fasttrain.data.batch import PackBatch
from fasttrain.model.checkpointing import checkpoint_decoder
from fasttrain.model.policy import Policy
from fasttrain.train.optimizer import MasterOptimizer


class TorchEngine:
    """One process, plain torch."""

    def __init__(self, policy: Policy, config: TrainConfig, checkpointing: bool) -> None:
        self.policy = policy
        if checkpointing:
            checkpoint_decoder(policy.model)
        self.optimizer = MasterOptimizer(policy, config)

    def forward(self, batch: PackBatch, **wants: bool) -> Any:
        """The head's output for the batch's rows."""
        return self.policy(batch, **wants)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.gather_gradients()

    def step(self, factor: float) -> Tensor:
        """Update with the gathered gradients; their norm before clipping, on the device."""
        return self.optimizer.step(factor)
