"""The recipe's loss on per-token log-probs: sums, pairs, `preference_loss`, and the metrics of the pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.config import LossConfig
from fasttrain_kernels import preference_loss

# What a step reports, as sums over its pairs, in the order of the vector that accumulates them.
SUMS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")


@dataclass(frozen=True)
class PairResult:
    """Losses of P pairs and the sums that the metrics are made of."""

    loss_P: Tensor
    sums: Tensor  # (len(SUMS),) fp32, detached

    @property
    def total(self) -> Tensor:
        """Sum of the losses."""
        return self.loss_P.sum()


def sequence_sums(value_N: Tensor, lengths_S: Tensor) -> Tensor:
    """(S,) fp32 sums of consecutive stretches of a (N,) vector; deterministic."""
    return torch.segment_reduce(value_N.float(), "sum", lengths=lengths_S, axis=0)


class PairLoss:
    """Losses of pairs from per-token policy and reference log-probs."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.needs_log_p2 = config.use_weighting

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the step."""
        return any(kind.startswith("aot") for kind in self.config.kinds)

    def __call__(
        self, logp_N: Tensor, reference_N: Tensor, lengths_S: Tensor, pairs_P2: Tensor,
        log_p2_N: Tensor | None = None,
    ) -> PairResult:  # fmt: skip
        config = self.config
        policy_S, reference_S = sequence_sums(logp_N, lengths_S), sequence_sums(reference_N, lengths_S)
        chosen_P, rejected_P = pairs_P2.unbind(1)
        out = preference_loss(
            policy_S[chosen_P], policy_S[rejected_P], reference_S[chosen_P], reference_S[rejected_P],
            kind=config.kind, weights=config.weights, beta=config.beta, label_smoothing=config.label_smoothing,
            chosen_length=lengths_S[chosen_P], rejected_length=lengths_S[rejected_P],
        )  # fmt: skip
        with torch.no_grad():
            better = (out.chosen_reward > out.rejected_reward).float()
            columns = [out.losses, out.chosen_reward, out.rejected_reward, better]
            columns += [policy_S[chosen_P], policy_S[rejected_P]]
            sums = torch.stack([column.detach().float().sum() for column in columns])
        return PairResult(out.losses, sums)
