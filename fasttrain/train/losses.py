"""The recipe's loss on per-token log-probs: sums, pairs, `preference_loss`, and the metrics of the pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.config import LossConfig
from fasttrain.errors import UserError
from fasttrain_kernels import COUPLE_PAIRS, pair_sums, preference_loss, wpo_weights

# The kinds whose formula holds label smoothing.
TAKE_SMOOTHING = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo"}

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


class PairLoss:
    """Losses of pairs from per-token policy and reference log-probs; UserError if the recipe's options contradict."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.needs_log_p2 = config.use_weighting
        self.couples_pairs = bool(COUPLE_PAIRS & set(config.kinds))
        if config.label_smoothing and not set(config.kinds) & TAKE_SMOOTHING:
            raise UserError(
                f"loss.label_smoothing: wanted 0 with {', '.join(config.kinds)}, which do not use it, "
                f"got {config.label_smoothing}"
            )
        try:
            one, length = torch.zeros(1), torch.ones(1, dtype=torch.int64)
            self(one, one, length, torch.zeros(1, 2, dtype=torch.int64), one, 1.0)
        except ValueError as error:
            raise UserError(f"loss: {str(error).removeprefix('preference_loss: ')}") from None

    def __call__(
        self, logp_N: Tensor, reference_N: Tensor, lengths_S: Tensor, pairs_P2: Tensor, log_p2_N: Tensor | None,
        mean_chosen_length: float,
    ) -> PairResult:  # fmt: skip
        """Losses and sums of the P pairs; `mean_chosen_length` is the whole step's, whatever part of it this is."""
        config = self.config
        # fp64: a log-ratio is a small difference of two sums in the hundreds
        logp_N, reference_N = logp_N.double(), reference_N.double()
        chosen_P, rejected_P = pair_sums(logp_N, lengths_S, pairs_P2)
        scored = (chosen_P, rejected_P)
        ref = pair_sums(reference_N, lengths_S, pairs_P2, config.ld_alpha)
        if config.ld_alpha is not None:
            scored = pair_sums(logp_N, lengths_S, pairs_P2, config.ld_alpha)
        weight = None
        if self.needs_log_p2:
            assert log_p2_N is not None
            weight = wpo_weights(logp_N.detach(), log_p2_N.double(), lengths_S, pairs_P2)
        out = preference_loss(
            *scored, *ref, kind=config.kind, weights=config.weights, beta=config.beta,
            label_smoothing=config.label_smoothing, f_divergence=config.f_divergence,
            chosen_length=lengths_S[pairs_P2[:, 0]], rejected_length=lengths_S[pairs_P2[:, 1]],
            weight=weight, mean_chosen_length=mean_chosen_length, sft_logprob=chosen_P,
        )  # fmt: skip
        with torch.no_grad():
            better = (out.chosen_reward > out.rejected_reward).float()
            columns = [out.losses, out.chosen_reward, out.rejected_reward, better, chosen_P, rejected_P]
            sums = torch.stack([column.detach().double().sum() for column in columns]).float()
        return PairResult(out.losses, sums)
