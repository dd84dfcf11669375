"""`FusedLinearPreferenceLoss` against whole logits in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import (
    FusedLinearPreferenceLoss,
    pair_sums,
    preference_logps,
    preference_loss,
    wpo_weights,
)


def batch(pairs: int = 3, length: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(2 * pairs, length, 24, generator=g)
    weight = torch.randn(307, 24, generator=g) * 0.3
    target = torch.randint(0, 307, (2 * pairs, length), generator=g)
    target[:, :3] = -100
    target[1, 7:] = -100
    target[4, 9:] = -100
    return hidden, weight, target


def token_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return logp * (target != -100)


def test_the_loss_and_the_gradient_of_the_hidden_states_equal_whole_logits() -> None:
    hidden, weight, target = batch()
    reference = torch.tensor([-50.0, -20.0, -45.0]), torch.tensor([-48.0, -50.0, -31.0])
    ours, true = hidden.requires_grad_(), hidden.detach().double().requires_grad_()
    out = FusedLinearPreferenceLoss(beta=0.2)(ours, weight, target, *reference)
    chosen, rejected = token_logps(true, weight.double(), target).sum(1).chunk(2)
    losses = -torch.nn.functional.logsigmoid(0.2 * ((chosen - reference[0]) - (rejected - reference[1])))
    losses.mean().backward()
    out.loss.backward()
    assert torch.allclose(out.losses.double(), losses, rtol=1e-5)
    assert ours.grad is not None and true.grad is not None
    assert torch.allclose(ours.grad.double(), true.grad, atol=1e-6)
    assert weight.grad is None


def test_padded_and_packed_batches_agree_and_a_trained_head_gets_its_gradient() -> None:
    hidden, weight, target = batch()
    ref = torch.full((3,), -40.0)
    padded_w, packed_w = (weight.clone().requires_grad_() for _ in range(2))
    loss = FusedLinearPreferenceLoss(kind=["sigmoid", "sft"], weights=[1.0, 0.2])
    padded = loss(hidden, padded_w, target, ref, ref)
    kept = target != -100
    pairs = torch.tensor([[0, 3], [1, 4], [2, 5]])
    packed = loss(hidden[kept], packed_w, target[kept], ref, ref, lengths_S=kept.sum(1), pairs_P2=pairs)
    padded.loss.backward()
    packed.loss.backward()
    assert torch.equal(padded.losses, packed.losses)
    assert padded_w.grad is not None and packed_w.grad is not None
    assert torch.equal(padded_w.grad, packed_w.grad)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": ["sigmoid", "sft"]}, {"kind": "ipo"}, {"kind": "simpo"}, {"kind": "orpo"}, {"kind": "sigmoid_norm"},
        {"use_weighting": True}, {"ld_alpha": 0.5},
    ],
)  # fmt: skip
def test_ignored_rows_of_a_packed_batch_are_no_tokens_of_their_answer(options: dict) -> None:
    hidden, weight, target = batch()
    weight = weight * 0.3  # or WPO's weights would all be 0
    target[2, 5:7] = -100
    ref = torch.full((3,), -40.0)
    loss = FusedLinearPreferenceLoss(**options)
    every_row = {"lengths_S": torch.full((6,), 11), "pairs_P2": torch.tensor([[0, 3], [1, 4], [2, 5]])}
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    packed = loss(ours.flatten(0, 1), weight, target.flatten(), ref, ref, **every_row)
    padded = loss(theirs, weight, target, ref, ref)
    assert torch.equal(packed.losses, padded.losses)
    packed.loss.backward()
    padded.loss.backward()
    assert ours.grad is not None and theirs.grad is not None and theirs.grad.any()
    assert torch.equal(ours.grad, theirs.grad)
    with pytest.raises(ValueError, match="lengths_S: wanted lengths that add up to 66 rows, got 60"):
        loss(ours.flatten(0, 1), weight, target.flatten(), ref, ref,
             lengths_S=torch.full((6,), 10), pairs_P2=every_row["pairs_P2"])  # fmt: skip


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sigmoid_norm", "simpo", "orpo", "sft"])
def test_an_answer_without_a_scored_token_leaves_the_other_pairs_their_losses(kind: str) -> None:
    hidden, weight, target = batch()
    ref = torch.full((3,), -40.0)
    loss = FusedLinearPreferenceLoss(kind)
    whole = loss(hidden, weight, target, ref, ref).losses
    target[0] = -100
    hidden.requires_grad_()
    out = loss(hidden, weight, target, ref, ref)
    out.loss.backward()
    assert out.losses.isfinite().all() and hidden.grad is not None and hidden.grad.isfinite().all()
    if kind != "sft":  # which divides by the tokens of the whole batch
        assert torch.equal(out.losses[1:], whole[1:])


def test_a_batch_without_pairs_adds_nothing_to_a_sum_of_losses() -> None:
    hidden, weight = torch.ones(0, 5, 8, requires_grad=True), torch.ones(11, 8, requires_grad=True)
    nothing = torch.zeros(0)
    loss = FusedLinearPreferenceLoss(ld_alpha=0.5, use_weighting=True)
    out = loss(hidden, weight, torch.zeros(0, 5, dtype=torch.int64), nothing, nothing)
    total = out.losses.sum()
    total.backward()
    assert total.item() == 0 and out.losses.shape == (0,) and out.loss.item() == 0
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(11, 8))
    assert hidden.grad is not None and hidden.grad.shape == (0, 5, 8)


def test_ld_alpha_and_wpo_weights_reach_the_loss() -> None:
    hidden, weight, target = batch()
    kept = target != -100
    lengths, pairs = kept.sum(1), torch.tensor([[0, 3], [1, 4], [2, 5]])
    ref = torch.full((3,), -40.0)
    out = FusedLinearPreferenceLoss(ld_alpha=0.3, use_weighting=True)(hidden, weight, target, ref, ref)
    logp_NV = (hidden[kept].double() @ weight.double().t()).log_softmax(-1)
    logp = logp_NV.gather(1, target[kept][:, None])[:, 0]
    confidence = logp - (2 * logp_NV).logsumexp(1)
    means = [part.mean().exp() for part in confidence.split(lengths.tolist())]
    pair_weight = torch.stack([means[i] * means[i + 3] for i in range(3)])
    plain = preference_loss(*pair_sums(logp, lengths, pairs, 0.3), ref.double(), ref.double())
    assert torch.allclose(out.losses.double(), plain.losses * pair_weight, rtol=1e-4)


def test_reference_free_kinds_need_no_reference() -> None:
    hidden, weight, target = batch()
    out = FusedLinearPreferenceLoss(kind="simpo", beta=2.0)(hidden, weight, target)
    assert out.losses.shape == (3,)
    with pytest.raises(ValueError, match="ref_chosen_P: wanted a tensor"):
        FusedLinearPreferenceLoss()(hidden, weight, target)


def test_a_wrong_shape_is_named() -> None:
    hidden, weight, target = batch()
    with pytest.raises(ValueError, match=r"target: wanted shape \(2P, T\)"):
        FusedLinearPreferenceLoss()(hidden, weight, target[:, 1:])
    with pytest.raises(ValueError, match="lengths_S, pairs_P2: wanted with packed"):
        FusedLinearPreferenceLoss()(hidden[0], weight, target[0])
    packed = {"lengths_S": torch.full((6,), 11), "pairs_P2": torch.tensor([[0, 3]])}
    with pytest.raises(ValueError, match=r"lengths_S, pairs_P2: wanted with packed hidden .* only"):
        FusedLinearPreferenceLoss()(hidden, weight, target, **packed)
    with pytest.raises(ValueError, match="softcap: wanted a positive"):
        FusedLinearPreferenceLoss(softcap=0.0)


@pytest.mark.parametrize("index", [-1, 6])
def test_a_pair_of_no_answer_is_refused(index: int) -> None:
    hidden, weight, target = batch()
    rows, lengths, pairs = torch.zeros(66), torch.full((6,), 11), torch.tensor([[0, 3], [1, index]])
    zero = torch.zeros(2)
    for call in (
        lambda: FusedLinearPreferenceLoss()(hidden.flatten(0, 1), weight, target.flatten(), zero, zero,
                                            lengths_S=lengths, pairs_P2=pairs),
        lambda: pair_sums(rows, lengths, pairs, 0.5),
        lambda: wpo_weights(rows, rows, lengths, pairs),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"pairs_P2: wanted indices in \[0, 6\), got {index}"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpo"}, "kind: wanted one of"),
        ({"beta": -1.0}, "beta: wanted a positive number, got -1.0"),
        ({"kind": "aot", "use_weighting": True}, "weight: wanted None with"),
        ({"ld_alpha": 3.0}, r"ld_alpha: wanted a number in \[0, 1\] or None, got 3.0"),
        ({"temperature": 0.0}, "temperature: wanted a positive finite number"),
    ],
)
def test_a_wrong_option_is_refused_before_a_model_has_run(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearPreferenceLoss(**options)


def test_preference_logps_sums_each_sequence() -> None:
    hidden, weight, target = batch()
    sums = preference_logps(hidden.flatten(0, 1), weight, target.flatten(), torch.full((6,), 11))
    assert torch.allclose(sums, token_logps(hidden, weight, target).sum(1), rtol=1e-5)


def test_a_bf16_sequence_of_1000_tokens_keeps_its_log_prob_where_bf16_log_softmax_loses_it() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 64, generator=g).bfloat16()
    weight = (torch.randn(4999, 64, generator=g) * 0.3).bfloat16()
    target = torch.randint(0, 4999, (1000,), generator=g)
    truth = token_logps(hidden.double(), weight.double(), target).sum().item()
    ours = preference_logps(hidden, weight, target, torch.tensor([1000])).item()
    plain = (hidden @ weight.t()).log_softmax(-1).gather(1, target[:, None]).sum().item()
    assert abs(ours - truth) < 0.05
    assert abs(plain - truth) > 0.05
