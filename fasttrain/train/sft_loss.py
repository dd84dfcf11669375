"""Cross-entropy on answers: the objective of `fasttrain sft`.

    loss = - sum of log p(token) over the step's answer tokens / their number

which is the mean over the step's target tokens, across all its packs and ranks, as in TRL's SFTTrainer and Hugging Face's
Trainer (loss summed, divided by `num_items_in_batch`): long answers weigh as much as they are long. Prompt tokens are never
targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.config import LossConfig
from fasttrain.data.pairs import read_example
from fasttrain.errors import UserError
from fasttrain.train.objective import PairResult
from fasttrain_kernels import pair_sums


class AnswerLoss:
    """Cross-entropy, with TRL's figures beside it; UserError if the recipe has a preference loss."""

    command, unit, title = "sft", "examples", "supervised fine-tuning"
    names: tuple[str, ...] = ("loss", "mean_token_accuracy", "entropy")
    needs_reference = couples_pairs = False
    single = True
    wants = {"entropy": True, "top1": True}
    reports: dict[str, bool] = {}
    read = staticmethod(read_example)

    def __init__(self, config: LossConfig) -> None:
        default = LossConfig()
        for entry in dataclasses.fields(config):
            got = getattr(config, entry.name)
            if entry.name != "router_aux_weight" and got != getattr(default, entry.name):
                raise UserError(
                    f"loss.{entry.name}: wanted nothing with fasttrain sft, whose loss is the cross-entropy, got {got!r}"
                )

    def side(self, out: Any) -> Tensor:
        """(N, 2): whether the target is the most likely token, and the entropy in nats."""
        return torch.stack([out.top1.float(), out.entropy.detach()], dim=-1)

    def __call__(
        self, logp_N: Tensor, reference_N: Tensor | None, lengths_S: Tensor, pairs_P2: Tensor, side_N: Tensor | None,
        mean_chosen_length: float,
    ) -> PairResult:  # fmt: skip
        """Divided by the step's mean length, so that the mean over its examples is the mean over its tokens."""
        assert side_N is not None
        answer_P, _ = pair_sums(logp_N.double(), lengths_S, pairs_P2, validate=False)
        loss_P = -answer_P / mean_chosen_length
        with torch.no_grad():
            right_P, _ = pair_sums(side_N[:, 0].double(), lengths_S, pairs_P2, validate=False)
            entropy_P, _ = pair_sums(side_N[:, 1].double(), lengths_S, pairs_P2, validate=False)
            sums = torch.stack(
                [
                    loss_P.detach().sum(),
                    right_P.sum() / mean_chosen_length,
                    entropy_P.sum() / mean_chosen_length,
                ]
            )
        return PairResult(loss_P, sums.float())

    def metrics(self, sums: Sequence[float], pairs: int) -> dict[str, float]:
        return {name: value / pairs for name, value in zip(self.names, sums)}

    def note(self, line: dict[str, Any]) -> str:
        return f"loss {line['loss']:.4f}  accuracy {line['mean_token_accuracy']:.3f}"

    def summary(self, line: dict[str, Any]) -> str:
        return f"loss {line['loss']:.4f}, mean_token_accuracy {line['mean_token_accuracy']:.3f}"

    def unshared_tokens(self, lengths: np.ndarray, pairs: np.ndarray) -> int:
        return int(sum(lengths[0] + lengths[1 + answer] for answer, _ in pairs))
