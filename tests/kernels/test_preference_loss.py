"""`preference_loss` against formulas written out a second time, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import F_DIVERGENCES, KINDS, REFERENCE_FREE, pair_sums, preference_loss, wpo_weights
from fasttrain_kernels.preference_kinds import NEED_LENGTHS, TAKE_F_DIVERGENCE

BETA, SMOOTH, TAU, GAMMA, F_ALPHA = 0.13, 0.2, 0.05, 0.4, 0.3


def S(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


# Per-pair losses from (chosen, rejected, ref chosen, ref rejected, chosen length, rejected length), fp64.
TRUTH: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda a, b, x, y, m, n: -(1 - SMOOTH) * S(BETA * (a - x - b + y)).log()
    - SMOOTH * S(-BETA * (a - x - b + y)).log(),
    "robust": lambda a, b, x, y, m, n: (
        -(1 - SMOOTH) * S(BETA * (a - x - b + y)).log() + SMOOTH * S(-BETA * (a - x - b + y)).log()
    )
    / (1 - 2 * SMOOTH),
    "hinge": lambda a, b, x, y, m, n: (1 - BETA * (a - x - b + y)).clamp(min=0),
    "ipo": lambda a, b, x, y, m, n: ((a - x) / m - (b - y) / n - 1 / (2 * BETA)) ** 2,
    "sigmoid_norm": lambda a, b, x, y, m, n: -S(BETA * ((a - x) / m - (b - y) / n)).log(),
    "exo_pair": lambda a, b, x, y, m, n: S(BETA * (a - x - b + y)) * (S(BETA * (a - x - b + y)) / (1 - SMOOTH)).log()
    + S(-BETA * (a - x - b + y)) * (S(-BETA * (a - x - b + y)) / SMOOTH).log(),
    "nca_pair": lambda a, b, x, y, m, n: -S(BETA * (a - x)).log()
    - 0.5 * S(-BETA * (a - x)).log()
    - 0.5 * S(-BETA * (b - y)).log(),
    "bco_pair": lambda a, b, x, y, m, n: -S(BETA * (a - x)).log() - S(-BETA * (b - y)).log(),
    "sppo_hard": lambda a, b, x, y, m, n: (a - x - 1 / (2 * BETA)) ** 2 + (b - y + 1 / (2 * BETA)) ** 2,
    "aot": lambda a, b, x, y, m, n: -(1 - SMOOTH)
    * S(BETA * ((a - b).sort().values - (x - y).sort().values)).log()
    - SMOOTH * S(-BETA * ((a - b).sort().values - (x - y).sort().values)).log(),
    "aot_unpaired": lambda a, b, x, y, m, n: -(1 - SMOOTH)
    * S(BETA * ((a - x).sort().values - (b - y).sort().values)).log()
    - SMOOTH * S(-BETA * ((a - x).sort().values - (b - y).sort().values)).log(),
    "apo_zero": lambda a, b, x, y, m, n: 1 - S(BETA * (a - x)) + S(BETA * (b - y)),
    "apo_down": lambda a, b, x, y, m, n: S(BETA * (a - x)) + 1 - S(BETA * (a - x - b + y)),
    "discopop": lambda a, b, x, y, m, n: (1 - S(BETA * (a - x - b + y) / TAU)) * -S(BETA * (a - x - b + y)).log()
    + S(BETA * (a - x - b + y) / TAU) * torch.exp(-BETA * (a - x - b + y)),
    "sft": lambda a, b, x, y, m, n: -a * len(a) / m.sum(),
    "cpo": lambda a, b, x, y, m, n: -(1 - SMOOTH) * S(BETA * (a - b)).log() - SMOOTH * S(-BETA * (a - b)).log(),
    "simpo": lambda a, b, x, y, m, n: -(1 - SMOOTH) * S(BETA * (a / m - b / n) - GAMMA).log()
    - SMOOTH * S(-BETA * (a / m - b / n) + GAMMA).log(),
    "orpo": lambda a, b, x, y, m, n: -BETA
    * S((torch.exp(a / m) / (1 - torch.exp(a / m))).log() - (torch.exp(b / n) / (1 - torch.exp(b / n))).log()).log(),
}  # fmt: skip

SCORE: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - torch.exp(-x),
    "js_divergence": lambda x: math.log(2) + S(x).log(),
    "alpha_divergence": lambda x: (torch.exp((F_ALPHA - 1) * x) - 1) / (F_ALPHA - 1),
}


def pairs(count: int = 37) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(count)
    normal = lambda: torch.randn(count, generator=g, dtype=torch.float64)  # noqa: E731
    x, y = -60 + 20 * normal(), -70 + 20 * normal()
    m, n = (torch.randint(5, 200, (count,), generator=g) for _ in range(2))
    return {"chosen_P": (x + 1.5 * normal()).clamp(max=-1), "rejected_P": (y + 1.5 * normal()).clamp(max=-1),
            "ref_chosen_P": x, "ref_rejected_P": y, "chosen_length": m, "rejected_length": n}  # fmt: skip


def run(data: dict[str, Tensor], dtype: torch.dtype, **options):
    leaves = [data[name].to(dtype, copy=True).requires_grad_() for name in ("chosen_P", "rejected_P")]
    rest = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    rest.update(chosen_P=leaves[0], rejected_P=leaves[1])
    defaults = {
        "beta": BETA,
        "label_smoothing": SMOOTH,
        "discopop_tau": TAU,
        "simpo_gamma": GAMMA,
        "f_alpha": F_ALPHA,
    }
    out = preference_loss(**rest, **{**defaults, **options})
    return out, leaves


def truth(data: dict[str, Tensor], kind: str, score: Callable[[Tensor], Tensor] = lambda x: x):
    a, b = (data[name].clone().requires_grad_() for name in ("chosen_P", "rejected_P"))
    x, y, m, n = (data[k] for k in ("ref_chosen_P", "ref_rejected_P", "chosen_length", "rejected_length"))
    if kind in REFERENCE_FREE or kind.startswith("aot"):
        losses = TRUTH[kind](a, b, x, y, m, n)
    else:
        losses = TRUTH[kind](score(a - x) + x, score(b - y) + y, x, y, m, n)
    losses.mean().backward()
    return losses.detach(), (a.grad, b.grad)


def assert_close(ours: Tensor, true: Tensor, bar: float) -> None:
    assert (ours.detach().double() - true).abs().max() <= bar * true.abs().max().clamp(min=1)


def test_every_kind_has_a_formula_here() -> None:
    assert set(TRUTH) == set(KINDS)
    assert set(SCORE) == set(F_DIVERGENCES)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_the_formula(kind: str) -> None:
    data = pairs()
    losses, grads = truth(data, kind)
    for dtype, bar in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        out, leaves = run(data, dtype, kind=kind)
        out.loss.backward()
        assert_close(out.losses, losses, bar)
        assert_close(out.loss, losses.mean(), bar)
        for leaf, grad in zip(leaves, grads):
            if grad is not None:
                assert_close(leaf.grad, grad, bar)


@pytest.mark.parametrize("divergence", list(F_DIVERGENCES))
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "robust", "ipo"])
def test_f_divergences_replace_log_ratios_by_scores(kind: str, divergence: str) -> None:
    data = pairs()
    losses, grads = truth(data, kind, SCORE[divergence])
    out, leaves = run(data, torch.float64, kind=kind, f_divergence=divergence)
    out.losses.mean().backward()
    assert_close(out.losses, losses, 1e-9)
    for leaf, grad in zip(leaves, grads):
        assert_close(leaf.grad, grad, 1e-9)


def test_several_kinds_are_a_weighted_sum() -> None:
    data = pairs()
    one, two = truth(data, "sigmoid")[0], truth(data, "sft")[0]
    out, _ = run(data, torch.float64, kind=["sigmoid", "sft"], weights=[0.5, 2.0])
    assert_close(out.losses, 0.5 * one + 2.0 * two, 1e-9)


def test_equal_answers_cost_ln_2_and_rewards_are_beta_times_the_log_ratio() -> None:
    x = torch.tensor([-10.0, -20.0])
    out = preference_loss(x, x, x - 1, x - 1)
    assert out.losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)
    assert out.chosen_reward.tolist() == pytest.approx([0.1, 0.1])
    assert not out.chosen_reward.requires_grad


@pytest.mark.parametrize("kind", ["simpo", "orpo", ["orpo", "sft"]])
def test_without_a_reference_simpo_and_orpo_reward_an_answer_by_its_mean_log_prob(
    kind: str | list[str],
) -> None:
    # The long chosen answer is likelier a token, and less likely as a whole.
    chosen, rejected = torch.tensor([-20.0]), torch.tensor([-15.0])
    lengths = {"chosen_length": torch.tensor([40]), "rejected_length": torch.tensor([10])}
    out = preference_loss(chosen, rejected, None, None, kind=kind, beta=2.0, **lengths)
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == (-1.0, -3.0)
    with_cpo = preference_loss(chosen, rejected, None, None, kind="cpo", beta=2.0, **lengths)
    assert (with_cpo.chosen_reward.item(), with_cpo.rejected_reward.item()) == (-40.0, -30.0)
    referred = preference_loss(chosen, rejected, chosen - 1, rejected + 1, kind=kind, beta=2.0, **lengths)
    assert (referred.chosen_reward.item(), referred.rejected_reward.item()) == (2.0, -2.0)


def test_a_batch_cut_in_packs_has_the_same_losses() -> None:
    data = pairs()
    mean_length = data["chosen_length"].double().mean()
    kinds = [k for k in KINDS if not k.startswith("aot")]
    whole, _ = run(data, torch.float64, kind=kinds)
    parts = [run({k: v[rows] for k, v in data.items()}, torch.float64, kind=kinds, mean_chosen_length=mean_length)[0]
             for rows in (slice(0, 5), slice(5, 37))]  # fmt: skip
    assert_close(torch.cat([p.losses for p in parts]), whole.losses.detach(), 1e-12)


def test_weights_of_pairs_multiply_losses_and_carry_no_gradient() -> None:
    data = pairs()
    weight = torch.rand(37, dtype=torch.float64, requires_grad=True)
    out, _ = run({**data, "weight": weight.detach()}, torch.float64)
    plain, _ = run(data, torch.float64)
    assert_close(out.losses, (plain.losses * weight).detach(), 1e-12)


@pytest.mark.parametrize("divergence", list(F_DIVERGENCES))
def test_far_apart_log_probs_give_finite_losses_and_gradients(divergence: str) -> None:
    far, near = torch.tensor([-1e4, -1.0, -60.0, -2.0]), torch.tensor([-1.0, -1e4, -2.0, -60.0])
    length = torch.tensor([3, 900, 3, 3])
    for kind in KINDS if divergence == "reverse_kl" else sorted(TAKE_F_DIVERGENCE):
        leaves = [far.clone().requires_grad_(), near.clone().requires_grad_()]
        out = preference_loss(*leaves, near, far, kind=kind, label_smoothing=0.1, chosen_length=length,
                              rejected_length=length, f_divergence=divergence)  # fmt: skip
        out.loss.backward()
        for x in (out.losses, *(leaf.grad for leaf in leaves if leaf.grad is not None)):
            assert x.isfinite().all(), kind


@pytest.mark.parametrize("kind", sorted(NEED_LENGTHS) + ["sft"])
def test_an_answer_without_tokens_counts_as_one_token_long(kind: str) -> None:
    data = pairs(3)
    data["chosen_P"][0] = data["ref_chosen_P"][0] = 0.0
    data["chosen_length"][0] = 0
    one = data["chosen_length"].clamp(min=1)
    # sft divides by the tokens that there are: none here but the others'
    expected, _ = run({**data, "chosen_length": one}, torch.float64, kind=kind,
                      mean_chosen_length=data["chosen_length"].double().mean())  # fmt: skip
    out, leaves = run(data, torch.float64, kind=kind)
    out.loss.backward()
    assert out.losses.isfinite().all() and torch.equal(out.losses, expected.losses)
    assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None)
    nothing, _ = run({**data, "chosen_P": one * 0.0, "chosen_length": one * 0}, torch.float64, kind=kind)
    assert nothing.losses.isfinite().all()


def test_ld_alpha_scales_what_is_longer_than_the_shorter_answer() -> None:
    lengths = torch.tensor([4, 2, 3])
    value = torch.arange(1.0, 10.0).requires_grad_()
    # completions: [1 2 3 4] [5 6] [7 8 9]; pairs (0, 1) and (2, 0)
    pairs_P2 = torch.tensor([[0, 1], [2, 0]])
    chosen, rejected = pair_sums(value, lengths, pairs_P2, ld_alpha=0.5)
    assert chosen.tolist() == [1 + 2 + 0.5 * (3 + 4), 7 + 8 + 9]
    assert rejected.tolist() == [5 + 6, 1 + 2 + 3 + 0.5 * 4]
    plain = pair_sums(value, lengths, pairs_P2)
    assert [x.tolist() for x in plain] == [[10.0, 24.0], [11.0, 10.0]]
    rejected.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [1, 1, 1, 0.5, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_answers_that_many_pairs_cut_elsewhere(seed: int) -> None:
    torch.manual_seed(seed)
    lengths, pairs_P2 = torch.randint(0, 9, (5,)), torch.randint(0, 5, (1 + seed % 7, 2))
    value = torch.randn(int(lengths.sum()), requires_grad=True)
    answers = value.double().split(lengths.tolist())
    for alpha in (None, 0.3):
        expected = []
        for pair in pairs_P2.tolist():
            shared = min(len(answers[i]) for i in pair) if alpha is not None else 10
            for i in pair:
                expected.append(answers[i][:shared].sum() + (alpha or 0) * answers[i][shared:].sum())
        expected_P2 = torch.stack(expected).float().view(-1, 2)
        found_P2 = torch.stack(pair_sums(value, lengths, pairs_P2, alpha, validate=seed % 2 == 0), dim=1)
        torch.testing.assert_close(found_P2, expected_P2)
        weights = torch.randn(found_P2.shape)
        slopes = [
            torch.autograd.grad((sums * weights).sum(), value, retain_graph=True)[0]
            for sums in (found_P2, expected_P2)
        ]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths_S": torch.tensor([2, 2])}, "lengths_S: wanted lengths that add up to 5 rows, got 4"),
        (
            {"lengths_S": torch.tensor([-1, 6])},
            "lengths_S: wanted lengths that add up to 5 rows, got one of -1",
        ),
        (
            {"lengths_S": torch.tensor([2.0, 3.0])},
            r"lengths_S: wanted int64 of shape \(S,\), got torch.float32 \(2,\)",
        ),
        (
            {"pairs_P2": torch.tensor([0, 1])},
            r"pairs_P2: wanted int64 of shape \(P, 2\), got torch.int64 \(2,\)",
        ),
        ({"pairs_P2": torch.tensor([[0, 1, 1]])}, r"pairs_P2: wanted .*, got torch.int64 \(1, 3\)"),
        ({"value_N": torch.ones(5, 1)}, r"_N: wanted shape \(N,\), got \(5, 1\)"),
        ({"log_p2_N": torch.ones(1)}, r"log_p2_N: wanted shape \(5,\) as logp_N, got \(1,\)"),
    ],
)
def test_wrong_arguments_of_sums_are_named(change: dict[str, Tensor], message: str) -> None:
    right = {"lengths_S": torch.tensor([2, 3]), "pairs_P2": torch.tensor([[0, 1]]), **change}
    value_N, log_p2_N = right.pop("value_N", torch.ones(5)), right.pop("log_p2_N", torch.ones(5))
    with pytest.raises(ValueError, match=message):
        wpo_weights(value_N, log_p2_N, **right)
    if "log_p2_N" not in change:
        with pytest.raises(ValueError, match=message):
            pair_sums(value_N, **right)


@pytest.mark.parametrize("validate", [True, False])
def test_no_room_for_sums_is_not_told_as_wrong_lengths(
    validate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "segment_reduce", full)
    with pytest.raises(torch.OutOfMemoryError):
        pair_sums(torch.ones(5), torch.tensor([2, 3]), torch.tensor([[0, 1]]), validate=validate)


def test_wpo_weights_are_products_of_mean_token_confidences() -> None:
    logp, p2 = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-0.5, -1.5, -1.0])
    weight = wpo_weights(logp, p2, torch.tensor([2, 1]), torch.tensor([[0, 1]]))
    assert weight.tolist() == pytest.approx([math.exp(-1.0) * math.exp(-1.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpo"}, "kind: wanted one of sigmoid, .*, got 'dpo'"),
        ({"kind": ["sigmoid", "sft"], "weights": [1.0]}, "weights: wanted 2 numbers, one per kind, got 1"),
        ({"kind": "exo_pair"}, "label_smoothing: wanted a positive number for exo_pair"),
        ({"kind": "robust", "label_smoothing": 0.5}, "label_smoothing: wanted"),
        ({"kind": "ipo"}, r"chosen_length: wanted a tensor of shape \(2,\) for ipo, got None"),
        ({"kind": "nca_pair", "f_divergence": "forward_kl"}, "f_divergence: wanted 'reverse_kl' with"),
        ({"kind": "aot", "weight": torch.ones(2)}, "weight: wanted None with"),
        ({"beta": 0.0}, "beta: wanted a positive number, got 0.0"),
        ({"beta": torch.tensor(0.1)}, r"beta: wanted a positive number, got tensor\(0.1000\)"),
        ({"label_smoothing": float("nan")}, "label_smoothing: wanted .*, got nan"),
        (
            {"f_divergence": "alpha_divergence", "f_alpha": float("nan")},
            "f_alpha: wanted a finite number, got nan",
        ),
        (
            {"kind": "simpo", "simpo_gamma": torch.tensor(0.5)},
            r"simpo_gamma: wanted a finite number, got tensor\(0.5000\)",
        ),
        (
            {"kind": "discopop", "discopop_tau": float("nan")},
            "discopop_tau: wanted a positive number, got nan",
        ),
        ({"weights": [float("nan")]}, r"weights: wanted finite numbers, got \[nan\]"),
        ({"weight": torch.ones(3)}, r"weight: wanted shape \(2,\) as chosen_P, got \(3,\)"),
        ({"ref_chosen_P": None}, "ref_chosen_P: wanted a tensor"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_wanted_and_what_came(options: dict, message: str) -> None:
    x = torch.tensor([-1.0, -2.0])
    right = {"chosen_P": x, "rejected_P": x, "ref_chosen_P": x, "ref_rejected_P": x}
    with pytest.raises(ValueError, match=message):
        preference_loss(**{**right, **options})
