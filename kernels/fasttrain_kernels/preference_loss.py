"""From sequence log-probs of policy and reference to preference losses and rewards, for the whole DPO family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import backend_for, check_tensors, resolve_backend
from .once_differentiable import once_differentiable
from .preference_kinds import (
    COUPLE_PAIRS,
    F_DIVERGENCES,
    FORMULAS,
    KINDS,
    NEED_LENGTHS,
    REFERENCE_FREE,
    TAKE_F_DIVERGENCE,
    Terms,
    rewards_per_token,
)


class PreferenceLoss(NamedTuple):
    """loss (): mean of `losses`, 0 where there are none; losses (P,), differentiable too; rewards (P,), detached. fp32.

    A reward is beta * log(policy / reference) of the answer, whatever the kind. Without a reference it is beta * log-prob, of simpo
    and orpo (alone or with sft) beta * mean log-prob of a token.
    """

    loss: Tensor
    losses: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def preference_loss(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor | None, ref_rejected_P: Tensor | None,
    kind: str | Sequence[str] = "sigmoid", beta: float = 0.1, weights: Sequence[float] | None = None, *,
    label_smoothing: float = 0.0, chosen_length: Tensor | None = None, rejected_length: Tensor | None = None,
    f_divergence: str = "reverse_kl", f_alpha: float = 0.5, discopop_tau: float = 0.05, simpo_gamma: float = 0.5,
    weight: Tensor | None = None, mean_chosen_length: Tensor | float | None = None, sft_logprob: Tensor | None = None,
    backend: str | None = None,
) -> PreferenceLoss:  # fmt: skip
    """Losses and rewards of P pairs, differentiable in the policy's log-probs.

    Args:
        chosen_P, rejected_P: (P,) the policy's log-probs, summed over each answer.
        ref_chosen_P, ref_rejected_P: (P,) the reference's; None where every kind is reference-free.
        kind: one of `KINDS`, or several, whose weighted sum is the loss. Formulas and sources: `preference_kinds`.
        weights: one factor per kind; 1.0 each by default.
        chosen_length, rejected_length: (P,) token counts; ipo, sigmoid_norm, simpo and orpo need them, sft the first.
            An answer of 0 tokens counts as 1 token long.
        f_divergence, f_alpha: reverse_kl, forward_kl, js_divergence or alpha_divergence; see `Terms.score`.
        weight: (P,) factor per pair without gradient (WPO, arXiv 2406.11827).
        mean_chosen_length: chosen tokens per pair over the whole batch; sft divides by it. Default: the mean of
            `chosen_length`. Give it when the pairs of one batch are spread over several calls.
        sft_logprob: (P,) log-probs for the sft term where it must not be `chosen_P` (LD-DPO scales that one's tail).
        backend: "torch", "triton" or None: `backend_for(chosen_P)`, except that kinds in `COUPLE_PAIRS` are torch only.

    Each pair's loss depends on that pair alone, so a batch may be cut anywhere and its `losses` summed; the exceptions
    are aot and aot_unpaired, which sort over the batch (`COUPLE_PAIRS`) and must see all of it at once.
    ValueError names the argument, what was wanted and what came.
    """
    kinds, factors = check_options(
        kind, weights, beta=beta, label_smoothing=label_smoothing, f_divergence=f_divergence, f_alpha=f_alpha,
        discopop_tau=discopop_tau, simpo_gamma=simpo_gamma, weighted=weight is not None,
    )  # fmt: skip
    named = {"chosen_P": chosen_P, "rejected_P": rejected_P, "ref_chosen_P": ref_chosen_P,
             "ref_rejected_P": ref_rejected_P, "chosen_length": chosen_length, "rejected_length": rejected_length,
             "weight": weight, "sft_logprob": sft_logprob}  # fmt: skip
    _check_tensors(kinds, named)
    dtype = torch.float64 if chosen_P.dtype == torch.float64 else torch.float32
    wide = {name: x.to(dtype) for name, x in named.items() if x is not None}
    if "sft" in kinds and mean_chosen_length is None:
        if "chosen_length" not in wide:
            _refuse("chosen_length", "token counts for sft", None)
        mean_chosen_length = wide["chosen_length"].sum().clamp(min=1) / chosen_P.shape[0]
    # An answer without a scored token has log-prob 0, whatever that is divided by.
    wide |= {name: wide[name].clamp(min=1) for name in ("chosen_length", "rejected_length") if name in wide}
    reference = [wide[name].detach() if name in wide else None for name in ("ref_chosen_P", "ref_rejected_P")]
    terms = Terms(
        chosen=wide["chosen_P"], rejected=wide["rejected_P"], ref_chosen=reference[0], ref_rejected=reference[1],
        chosen_length=wide.get("chosen_length"), rejected_length=wide.get("rejected_length"),
        mean_chosen_length=None if mean_chosen_length is None else _scalar(mean_chosen_length, dtype, chosen_P.device),
        sft_logprob=wide.get("sft_logprob"), beta=beta, label_smoothing=label_smoothing, f_divergence=f_divergence,
        f_alpha=f_alpha, discopop_tau=discopop_tau, simpo_gamma=simpo_gamma,
    )  # fmt: skip
    pair_weight = wide["weight"].detach() if "weight" in wide else None
    if _backend(backend, kinds, chosen_P) == "triton":
        sft = terms.chosen if terms.sft_logprob is None else terms.sft_logprob
        return PreferenceLoss(
            *_OneLaunch.apply(terms.chosen, terms.rejected, sft, terms, kinds, factors, pair_weight)
        )
    losses = sum(factor * FORMULAS[name](terms) for name, factor in zip(kinds, factors))
    assert isinstance(losses, Tensor)
    if pair_weight is not None:
        losses = losses * pair_weight
    chosen_reward, rejected_reward = _rewards(terms, kinds)
    return PreferenceLoss(losses.sum() / max(1, len(losses)), losses, chosen_reward, rejected_reward)


def _scalar(x: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """() on the device; a number gets there without a copy that the host would wait for."""
    if isinstance(x, Tensor):
        return x.to(device, dtype, non_blocking=True)
    return torch.full((), x, dtype=dtype, device=device)


class _OneLaunch(torch.autograd.Function):
    """The Triton kernel, which makes losses and gradients together; the backward scales the gradients."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor, sft: Tensor, terms: Terms, kinds: tuple[str, ...],
                factors: tuple[float, ...], weight: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
        from .preference_loss_triton import launch

        out = launch(
            replace(terms, chosen=chosen, rejected=rejected, sft_logprob=sft), kinds, factors, weight
        )
        ctx.save_for_backward(out.chosen_grad, out.rejected_grad, out.sft_grad)
        ctx.mark_non_differentiable(out.chosen_reward, out.rejected_reward)
        return out.mean, out.losses, out.chosen_reward, out.rejected_reward

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad = grad_losses + grad_mean / grad_losses.shape[0]
        return *(grad * x for x in ctx.saved_tensors), None, None, None, None


def _backend(name: str | None, kinds: tuple[str, ...], tensor: Tensor) -> str:
    # Sorting over the batch is torch's: such kinds run there, and asking for Triton by name is an error.
    sorts = COUPLE_PAIRS & set(kinds)
    if name == "triton" and sorts:
        _refuse("backend", f"'torch' or None for {sorted(sorts)}, which sort over the batch", repr(name))
    if name is None:
        return "torch" if sorts else backend_for(tensor)
    return resolve_backend(name, tensor, "preference_loss")


@torch.no_grad()
def _rewards(t: Terms, kinds: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    if rewards_per_token(kinds, t.ref_chosen is not None):
        chosen_length, rejected_length = t.lengths
        return t.beta * t.chosen / chosen_length, t.beta * t.rejected / rejected_length
    if t.ref_chosen is None:
        return t.beta * t.chosen, t.beta * t.rejected
    c, r = t.ratios
    return t.beta * c, t.beta * r


def _refuse(name: str, wanted: object, got: object) -> None:
    raise ValueError(f"preference_loss: {name}: wanted {wanted}, got {got}")


def check_options(
    kind: str | Sequence[str], weights: Sequence[float] | None, *, beta: float, label_smoothing: float, f_divergence: str,
    f_alpha: float, discopop_tau: float, simpo_gamma: float, weighted: bool,
) -> tuple[tuple[str, ...], tuple[float, ...]]:  # fmt: skip
    """The kinds and a factor for each; ValueError where an option of `preference_loss` is wrong, or tensors where a kernel takes
    numbers. `weighted`: pairs have weights."""
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    for name in kinds:
        if name not in FORMULAS:
            _refuse("kind", f"one of {', '.join(KINDS)}", repr(name))
    if not kinds:
        _refuse("kind", "a kind or more", "none")
    factors = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(kinds)
    if len(factors) != len(kinds):
        _refuse("weights", f"{len(kinds)} numbers, one per kind", len(factors))
    if not all(abs(factor) < float("inf") for factor in factors):
        _refuse("weights", "finite numbers", list(factors))
    for name, number in (("f_alpha", f_alpha), ("simpo_gamma", simpo_gamma)):
        if not (isinstance(number, Real) and abs(number) < float("inf")):
            _refuse(name, "a finite number", repr(number))
    for name, number in (("beta", beta), ("discopop_tau", discopop_tau)):
        if not (isinstance(number, Real) and 0 < number < float("inf")):
            _refuse(name, "a positive number", repr(number))
    smooths = isinstance(label_smoothing, Real) and 0 <= label_smoothing < 1
    if not smooths or ("robust" in kinds and label_smoothing >= 0.5):
        _refuse("label_smoothing", "[0, 0.5) for robust, else [0, 1)", repr(label_smoothing))
    if "exo_pair" in kinds and label_smoothing == 0:
        _refuse("label_smoothing", "a positive number for exo_pair", label_smoothing)
    if f_divergence not in F_DIVERGENCES:
        _refuse("f_divergence", f"one of {', '.join(F_DIVERGENCES)}", repr(f_divergence))
    if f_divergence != "reverse_kl" and not set(kinds) <= TAKE_F_DIVERGENCE:
        _refuse(
            "f_divergence", f"'reverse_kl' with {sorted(set(kinds) - TAKE_F_DIVERGENCE)}", repr(f_divergence)
        )
    if weighted and COUPLE_PAIRS & set(kinds):
        _refuse(
            "weight",
            f"None with {sorted(COUPLE_PAIRS & set(kinds))}, whose losses belong to no pair",
            "weights",
        )
    return kinds, factors


def _check_tensors(kinds: tuple[str, ...], named: dict[str, Tensor | None]) -> None:
    chosen = named["chosen_P"]
    check_tensors("preference_loss", chosen_P=chosen, rejected_P=named["rejected_P"])
    check_tensors("preference_loss", **{name: x for name, x in named.items() if x is not None})
    assert chosen is not None
    if chosen.dim() != 1 or not chosen.is_floating_point():
        _refuse("chosen_P", "a floating tensor of shape (P,)", f"{chosen.dtype} {tuple(chosen.shape)}")
    for name, x in named.items():
        if x is not None and x.shape != chosen.shape:
            _refuse(name, f"shape {tuple(chosen.shape)} as chosen_P", tuple(x.shape))
        if x is not None and x.device != chosen.device:
            _refuse(name, f"device {chosen.device} as chosen_P", x.device)
    required = [] if set(kinds) <= REFERENCE_FREE else ["ref_chosen_P", "ref_rejected_P"]
    if set(kinds) & NEED_LENGTHS:
        required += ["chosen_length", "rejected_length"]
    for name in required:
        if named[name] is None:
            _refuse(name, f"a tensor of shape {tuple(chosen.shape)} for {', '.join(kinds)}", None)
    if (named["ref_chosen_P"] is None) != (named["ref_rejected_P"] is None):
        _refuse("ref_rejected_P", "to be given or left out together with ref_chosen_P", "only one of them")


def preference_loss_ref(chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor,
                        beta: float = 0.1) -> Tensor:  # fmt: skip
    """The definition of plain DPO, arXiv 2305.18290 eq. 7: losses (P,)."""
    d = (chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P)
    return -torch.log(1 / (1 + torch.exp(-beta * d)))
