"""The recipe's loss on per-token log-probs: sums, pairs, `preference_loss`, and the metrics of the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.config import LossConfig
from fasttrain.data.pairs import read_pair
from fasttrain.errors import UserError
from fasttrain.settings import require
from fasttrain.train.objective import PairResult
from fasttrain_kernels import COUPLE_PAIRS, pair_sums, preference_loss, wpo_weights

# The kinds whose formula holds label smoothing.
TAKE_SMOOTHING = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo"}

# What a step reports, as sums over its pairs, in the order of the vector that accumulates them.
SUMS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
# Behind them on logged steps: sums over the tokens of the pairs' answers, and how many tokens these are.
TOKEN_SUMS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "chosen", "rejected")


class PairLoss:
    """Losses of pairs from per-token policy and reference log-probs; UserError if the recipe's options contradict."""

    command, unit, title = "dpo", "pairs", "Direct Preference Optimization"
    names: tuple[str, ...] = SUMS + TOKEN_SUMS
    needs_reference = True
    single = False
    reports = {"mean_logit": True, "entropy": True, "top1": True}
    read = staticmethod(read_pair)

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.wants = {"log_p2": True} if config.use_weighting else {}
        self.couples_pairs = bool(COUPLE_PAIRS & set(config.kinds))
        if config.label_smoothing and not set(config.kinds) & TAKE_SMOOTHING:
            raise UserError(
                f"loss.label_smoothing: wanted 0 with {', '.join(config.kinds)}, which do not use it, "
                f"got {config.label_smoothing}"
            )
        if set(config.kinds) == {"sft"}:
            for name, default in (("f_divergence", "reverse_kl"), ("ld_alpha", None)):
                got, wanted = getattr(config, name), "null" if default is None else default
                require(got == default, f"loss.{name}", f"{wanted} with sft, which does not use it", got)
        for name, part, used in (
            ("f_alpha", "loss.f_divergence alpha_divergence", config.f_divergence == "alpha_divergence"),
            ("discopop_tau", "loss.kind discopop", "discopop" in config.kinds),
            ("simpo_gamma", "loss.kind simpo", "simpo" in config.kinds),
        ):
            got, default = getattr(config, name), getattr(LossConfig, name)
            require(used or got == default, f"loss.{name}", f"no value without {part}", got)
        coupled = ", ".join(sorted(COUPLE_PAIRS & set(config.kinds)))
        wanted = f"false with {coupled}, whose losses belong to no pair"
        require(not (coupled and config.use_weighting), "loss.use_weighting", wanted, True)
        try:
            one, length = torch.zeros(1), torch.ones(1, dtype=torch.int64)
            side = one[:, None] if self.wants else None
            self(one, one, length, torch.zeros(1, 2, dtype=torch.int64), side, 1.0)
        except ValueError as error:
            raise UserError(f"loss.{str(error).removeprefix('preference_loss: ')}") from None

    def side(self, out: Any) -> Tensor | None:
        """(N, 0 to 4): what WPO weights are made of, if they are wanted; then, on logged steps, what `reports` names."""
        found = [out.log_p2, out.mean_logit, out.entropy, out.top1]
        columns = [column.detach().float() for column in found if column is not None]
        return torch.stack(columns, dim=-1) if columns else None

    def __call__(
        self, logp_N: Tensor, reference_N: Tensor | None, lengths_S: Tensor, pairs_P2: Tensor, side_N: Tensor | None,
        mean_chosen_length: float,
    ) -> PairResult:  # fmt: skip
        """Losses and sums of the P pairs; `mean_chosen_length` is the whole step's, whatever part of it this is."""
        config = self.config
        assert reference_N is not None
        # fp64: a log-ratio is a small difference of two sums in the hundreds
        logp_N, reference_N = logp_N.double(), reference_N.double()
        chosen_P, rejected_P = pair_sums(logp_N, lengths_S, pairs_P2, validate=False)
        scored = (chosen_P, rejected_P)
        ref = pair_sums(reference_N, lengths_S, pairs_P2, config.ld_alpha, validate=False)
        if config.ld_alpha is not None:
            scored = pair_sums(logp_N, lengths_S, pairs_P2, config.ld_alpha, validate=False)
        weight = None
        if self.wants:
            assert side_N is not None
            weight = wpo_weights(logp_N.detach(), side_N[:, 0].double(), lengths_S, pairs_P2, validate=False)
        out = preference_loss(
            *scored, *ref, kind=config.kind, weights=config.weights, beta=config.beta,
            label_smoothing=config.label_smoothing, f_divergence=config.f_divergence, f_alpha=config.f_alpha,
            discopop_tau=config.discopop_tau, simpo_gamma=config.simpo_gamma,
            chosen_length=lengths_S[pairs_P2[:, 0]], rejected_length=lengths_S[pairs_P2[:, 1]],
            weight=weight, mean_chosen_length=mean_chosen_length, sft_logprob=chosen_P,
        )  # fmt: skip
        with torch.no_grad():
            better = (out.chosen_reward > out.rejected_reward).float()
            columns = [out.losses, out.chosen_reward, out.rejected_reward, better, chosen_P, rejected_P]
            sums = torch.stack([column.detach().double().sum() for column in columns])
            tokens = sums.new_zeros(len(TOKEN_SUMS))
            if side_N is not None and side_N.shape[1] > len(self.wants):
                tokens = _token_sums(side_N[:, len(self.wants) :], lengths_S, pairs_P2)
        return PairResult(out.losses, torch.cat([sums, tokens]).float())

    def metrics(self, sums: Sequence[float], pairs: int) -> dict[str, float]:
        means = {name: value / pairs for name, value in zip(SUMS, sums)}
        margins = means["rewards/chosen"] - means["rewards/rejected"]
        first = {name: means[name] for name in SUMS[:3]}
        means = first | {"rewards/margins": margins} | {name: means[name] for name in SUMS[3:]}
        *by_token, chosen, rejected = sums[len(SUMS) :]
        if chosen:  # a logged step
            counts = (chosen, rejected, chosen + rejected, chosen)
            means |= {name: value / count for name, value, count in zip(TOKEN_SUMS, by_token, counts)}
        return means

    def note(self, line: dict[str, Any]) -> str:
        return f"loss {line['loss']:.4f}  margin {line['rewards/margins']:.3f}"

    def summary(self, line: dict[str, Any]) -> str:
        return f"loss {line['loss']:.4f}, rewards/margins {line['rewards/margins']:.3f}"

    def unshared_tokens(self, lengths: np.ndarray, pairs: np.ndarray) -> int:
        """Every answer behind its own copy of the prompt, through policy and reference."""
        return 2 * int(sum(2 * lengths[0] + lengths[1 + c] + lengths[1 + r] for c, r in pairs))


def _token_sums(reports_N3: Tensor, lengths_S: Tensor, pairs_P2: Tensor) -> Tensor:
    """TOKEN_SUMS of the pairs, from each token's mean logit, entropy, and whether it is the most likely one."""
    columns = [*reports_N3.double().unbind(1), torch.ones_like(reports_N3[:, 0])]
    sums = [torch.stack(pair_sums(x_N, lengths_S, pairs_P2, validate=False)).sum(1) for x_N in columns]
    logits_2, entropy_2, right_2, tokens_2 = [each_2.double() for each_2 in sums]
    return torch.cat([logits_2, entropy_2.sum(0, keepdim=True), right_2[:1], tokens_2])
