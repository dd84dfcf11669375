"""From hidden states and the head's weight to a preference loss, with cached reference log-probs as plain arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backends import check_tensors
from .head_options import LogitTransform
from .linear_logprob import IGNORED, linear_logprob
from .preference_loss import PreferenceLoss, check_options, preference_loss
from .sequence_logprob import check_ld_alpha, check_pairs, pair_sums, sequence_sums, wpo_weights


class FusedLinearPreferenceLoss(nn.Module):
    """`linear_logprob`, sums over answers, `preference_loss`: a whole DPO step after the model, without logits.

        loss = FusedLinearPreferenceLoss(kind="sigmoid", beta=0.1)
        out = loss(hidden, lm_head.weight, labels, ref_chosen, ref_rejected)      # chosen answers first, then rejected
        out.loss.backward()

    It has no parameters. Options are those of `preference_loss` and of the logits; `ld_alpha` (LD-DPO) and
    `use_weighting` (WPO) work on the per-token log-probs that exist here. With `ld_alpha` the reference log-probs must
    be LD sums too: `pair_sums` makes them from cached per-token values. ValueError where an option is wrong.
    """

    def __init__(
        self, kind: str | Sequence[str] = "sigmoid", beta: float = 0.1, weights: Sequence[float] | None = None, *,
        label_smoothing: float = 0.0, f_divergence: str = "reverse_kl", f_alpha: float = 0.5,
        discopop_tau: float = 0.05, simpo_gamma: float = 0.5, ld_alpha: float | None = None,
        use_weighting: bool = False, temperature: float = 1.0, logit_scale: float = 1.0,
        softcap: float | None = None, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.loss: dict[str, Any] = {
            "kind": kind, "beta": beta, "weights": weights, "label_smoothing": label_smoothing,
            "f_divergence": f_divergence, "f_alpha": f_alpha, "discopop_tau": discopop_tau, "simpo_gamma": simpo_gamma,
        }  # fmt: skip
        check_options(**self.loss, weighted=use_weighting)
        check_ld_alpha(ld_alpha)
        LogitTransform(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
        self.head: dict[str, Any] = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "backend": backend,
        }
        self.ld_alpha, self.use_weighting = ld_alpha, use_weighting

    def forward(
        self, hidden: Tensor, weight_VD: Tensor, target: Tensor, ref_chosen_P: Tensor | None = None,
        ref_rejected_P: Tensor | None = None, *, bias: Tensor | None = None, lengths_S: Tensor | None = None,
        pairs_P2: Tensor | None = None,
    ) -> PreferenceLoss:  # fmt: skip
        """Loss and rewards of P pairs.

        Padded: hidden (2P, T, D) and target (2P, T), chosen answers in the first half; target[i, t] is what position t
        predicts (labels already shifted), -100 where nothing counts. Packed: hidden (N, D), target (N,) completion by
        completion, -100 as there, int64 lengths_S (S,) rows of each, ignored ones included, and pairs_P2 (P, 2) naming
        each pair's chosen and rejected completion. Only scored tokens count in any length.
        ref_chosen_P, ref_rejected_P: (P,) cached sums; None for reference-free kinds.
        """
        check_tensors("FusedLinearPreferenceLoss", hidden=hidden, target=target)
        if hidden.dim() == 3:
            if lengths_S is not None or pairs_P2 is not None:
                raise ValueError(
                    "FusedLinearPreferenceLoss: lengths_S, pairs_P2: wanted with packed hidden (N, D) only, got "
                    f"hidden {tuple(hidden.shape)}"
                )
            hidden, target, lengths_S, pairs_P2 = _packed(hidden, target)
        elif lengths_S is None or pairs_P2 is None:
            raise ValueError(
                "FusedLinearPreferenceLoss: lengths_S, pairs_P2: wanted with packed hidden (N, D), got None"
            )
        else:
            check_tensors("FusedLinearPreferenceLoss", lengths_S=lengths_S, pairs_P2=pairs_P2)
            check_pairs("FusedLinearPreferenceLoss", pairs_P2, len(lengths_S))
        rows = linear_logprob(hidden, weight_VD, target, bias, log_p2=self.use_weighting, **self.head)
        order_N, lengths_S = _scored_first(target, lengths_S)
        logp_N = rows.logprob[order_N]
        sums = pair_sums(logp_N, lengths_S, pairs_P2, self.ld_alpha, validate=False)
        sft = sums if self.ld_alpha is None else pair_sums(logp_N, lengths_S, pairs_P2, validate=False)
        pair_weight = None
        if rows.log_p2 is not None:
            pair_weight = wpo_weights(logp_N, rows.log_p2[order_N], lengths_S, pairs_P2, validate=False)
        return preference_loss(
            *sums, ref_chosen_P, ref_rejected_P, **self.loss, chosen_length=lengths_S[pairs_P2[:, 0]],
            rejected_length=lengths_S[pairs_P2[:, 1]], sft_logprob=sft[0], weight=pair_weight,
            backend=self.head["backend"],
        )  # fmt: skip

    def extra_repr(self) -> str:
        options = {**self.loss, **self.head, "ld_alpha": self.ld_alpha, "use_weighting": self.use_weighting}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)


def _scored_first(target_N: Tensor, lengths_S: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) order of the rows with the ignored ones at the end, and each completion's scored tokens (S,).

    ValueError if the lengths do not add up to N; the only wait for the device.
    """
    ignored_N, lengths_S = target_N == IGNORED, lengths_S.to(target_N.device, non_blocking=True)
    lengths_S = lengths_S - sequence_sums(ignored_N, lengths_S).to(lengths_S.dtype)
    return ignored_N.to(torch.int8).argsort(stable=True), lengths_S


def _packed(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(2P, T, D) and (2P, T) without the rows that do not count; lengths and pairs of what is left."""
    if target.shape != hidden.shape[:2] or hidden.shape[0] % 2:
        raise ValueError(
            "FusedLinearPreferenceLoss: target: wanted shape (2P, T) as hidden (2P, T, D), got "
            f"{tuple(target.shape)} with {tuple(hidden.shape)}"
        )
    kept = target != IGNORED
    pairs = target.shape[0] // 2
    index = torch.arange(pairs, device=target.device)
    return hidden[kept], target[kept], kept.sum(1), torch.stack([index, index + pairs], 1)
