"""`preference_loss` against TRL 1.16's own loss code, values and gradients, for every kind that TRL has."""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import pair_sums, preference_loss, wpo_weights

PAIRS, LENGTH = 5, 23
KINDS = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
         "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]  # fmt: skip
DIVERGENCES = ["forward_kl", "js_divergence", "alpha_divergence"]


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl")
        return trl.DPOTrainer


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-token policy and reference log-probs (2P, T), log sum p^2, and the completion mask (2P, T + 1)."""
    g = torch.Generator().manual_seed(3)
    policy = -torch.rand(2 * PAIRS, LENGTH, generator=g) * 3
    reference = policy - torch.randn(2 * PAIRS, LENGTH, generator=g) * 0.2
    squares = -torch.rand(2 * PAIRS, LENGTH, generator=g)
    mask = torch.zeros(2 * PAIRS, LENGTH + 1, dtype=torch.int64)
    for i, n in enumerate(torch.randint(3, LENGTH, (2 * PAIRS,), generator=g).tolist()):
        mask[i, 2 : 2 + n] = 1
    return policy, reference, squares, mask


def theirs(
    trainer_class: Any, ref: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Tensor]:
    """TRL's loss on a model that returns the batch's log-probs, and its gradient with respect to them."""
    policy, _, squares, mask = batch()
    policy = policy.to(dtype, copy=True).requires_grad_()
    outputs = SimpleNamespace(log_probs=policy * mask[:, 1:], log_sum_sq_probs=squares.to(dtype), entropy=policy.detach(),
                              mean_logits=policy.detach(), is_top1=mask[:, 1:].bool())  # fmt: skip
    same = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False, precompute_ref_logps=True, beta=0.13, label_smoothing=0.2, loss_weights=[1.0],
        f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.3, ld_alpha=None, use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05), _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer.__dict__.update(options)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "ref_chosen_logps": ref[0].to(dtype),
              "ref_rejected_logps": ref[1].to(dtype)}  # fmt: skip
    loss = trainer_class._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.detach(), policy.grad


def ours(
    ref: tuple[Tensor, Tensor], ld_alpha: float | None = None, wpo: bool = False, **options: Any
) -> tuple:
    policy, _, squares, mask = batch()
    policy = policy.double().requires_grad_()
    kept = mask[:, 1:].bool()
    lengths = kept.sum(1)
    pairs = torch.arange(2 * PAIRS).view(2, PAIRS).t()
    sums = pair_sums(policy[kept], lengths, pairs, ld_alpha)
    plain = pair_sums(policy[kept], lengths, pairs)
    weight = wpo_weights(policy[kept], squares.double()[kept], lengths, pairs) if wpo else None
    defaults = {"beta": 0.13, "label_smoothing": 0.2, "f_alpha": 0.3, "discopop_tau": 0.05}
    out = preference_loss(*sums, *ref, chosen_length=lengths[:PAIRS], rejected_length=lengths[PAIRS:], weight=weight,
                          sft_logprob=plain[0], **{**defaults, **options})  # fmt: skip
    out.loss.backward()
    return out.loss.detach(), policy.grad


def reference(ld_alpha: float | None = None) -> tuple[Tensor, Tensor]:
    _, per_token, _, mask = batch()
    kept = mask[:, 1:].bool()
    pairs = torch.arange(2 * PAIRS).view(2, PAIRS).t()
    return pair_sums(per_token[kept].double(), kept.sum(1), pairs, ld_alpha)


def assert_same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], bar: float = 1e-7) -> None:
    for mine, other in zip(first, second):
        assert torch.allclose(mine, other.double(), rtol=bar, atol=bar)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_trl_has_its_value_and_gradient_here(trainer_class: Any, kind: str) -> None:
    ref = reference()
    # TRL ignores label_smoothing for sigmoid; conservative DPO is ours.
    smoothing = {"label_smoothing": 0.0} if kind == "sigmoid" else {}
    assert_same(ours(ref, kind=kind, **smoothing), theirs(trainer_class, ref, loss_types=[kind]))


def test_kinds_here_are_all_of_trls(trainer_class: Any) -> None:
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        theirs(trainer_class, reference(), loss_types=["none"])
    named = set(str(error.value).partition("one of ")[2].strip("[]").replace("'", "").split(", "))
    assert named == set(KINDS)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "kind", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
)
def test_f_divergences(trainer_class: Any, kind: str, divergence: str) -> None:
    ref = reference()
    smoothing = {"label_smoothing": 0.0} if kind == "sigmoid" else {}
    # TRL's alpha divergence has no fp64.
    dtype, bar = (torch.float32, 2e-5) if divergence == "alpha_divergence" else (torch.float64, 1e-7)
    expected = theirs(trainer_class, ref, dtype, loss_types=[kind], f_divergence_type=divergence)
    assert_same(ours(ref, kind=kind, f_divergence=divergence, **smoothing), expected, bar)


def test_weighted_sums_length_desensitisation_and_wpo_weights(trainer_class: Any) -> None:
    # Not hinge: TRL weights its relu in place, and autograd refuses.
    kinds, weights = ["sigmoid_norm", "ipo", "bco_pair"], [0.5, 2.0, 0.3]
    ref = reference(ld_alpha=0.4)
    assert_same(
        ours(ref, ld_alpha=0.4, wpo=True, kind=kinds, weights=weights),
        theirs(trainer_class, ref, loss_types=kinds, loss_weights=weights, ld_alpha=0.4, use_weighting=True),
    )
