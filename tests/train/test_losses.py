"""Every loss of the recipe through the whole trainer: it runs, and cutting its step into packs does not change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.config import LOSS_KINDS, LossConfig
from fasttrain.errors import UserError
from fasttrain.train.losses import TAKE_SMOOTHING, PairLoss
from fasttrain_kernels import preference_loss


def run(model: Path, pairs: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    raw = {
        "model": {"name": str(model)},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(pairs)},
        "train": {
            "output": str(folder), "epochs": 1, "pairs_per_step": 6, "learning_rate": 1e-2, "warmup_ratio": 0.0,
            "schedule": "constant", "tokens_per_pack": 100_000,
        },
        "track": [],
    }  # fmt: skip
    return train_dpo(config_from_dict(raw, overrides), overwrite=True).metrics


CASES = [
    [f"loss.kind={kind}", f"loss.label_smoothing={0.1 if kind in TAKE_SMOOTHING else 0}"]
    for kind in LOSS_KINDS
]
CASES += [
    ["loss.kind=[sigmoid, sft]", "loss.weights=[1.0, 0.3]"],
    ["loss.ld_alpha=0.4"],
    ["loss.use_weighting=true"],
    ["loss.f_divergence=js_divergence"],
]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: " ".join(settings).replace("loss.", ""))
def test_a_loss_does_not_depend_on_packs(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path, settings: list[str]
) -> None:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 18)
    whole = run(tiny_text, pairs, tmp_path / "run", *settings)
    cut = run(tiny_text, pairs, tmp_path / "run", *settings, "train.tokens_per_pack=60")
    assert len(whole) >= 3
    for number, (a, b) in enumerate(zip(whole, cut)):
        assert a["tokens"] != b["tokens"]  # groups were split, so packs ran twice
        for name in ("loss", "grad_norm", "logits/chosen", "entropy", "mean_token_accuracy"):
            assert b[name] == pytest.approx(a[name], rel=2e-5 * (1 + number), abs=1e-6)


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_label_smoothing_changes_a_loss_or_is_refused(kind: str) -> None:
    logp, lengths = torch.tensor([-3.0, -1.0, -2.5, -4.0]), torch.tensor([2, 2])
    pairs = torch.tensor([[0, 1]])
    if kind not in TAKE_SMOOTHING:
        with pytest.raises(UserError, match=f"loss.label_smoothing: wanted 0 with {kind}"):
            PairLoss(LossConfig(kind=kind, label_smoothing=0.1))
        return
    values = [
        float(
            PairLoss(LossConfig(kind=kind, label_smoothing=s))(
                logp, logp + 0.3, lengths, pairs, None, 2.0
            ).total
        )
        for s in (0.05, 0.2)
    ]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("options", "name", "values"),
    [
        ({"f_divergence": "alpha_divergence"}, "f_alpha", (-1.0, 0.5, 1.5)),
        ({"kind": ["discopop", "sft"]}, "discopop_tau", (0.01, 0.05, 2.0)),
        ({"kind": "simpo"}, "simpo_gamma", (0.0, 0.5, 1.4)),
    ],
)
def test_a_constant_of_the_recipe_is_that_of_the_formula(
    options: dict[str, Any], name: str, values: tuple[float, ...]
) -> None:
    logp, lengths = torch.tensor([-3.0, -1.0, -2.5, -4.0]), torch.tensor([2, 2])
    reference, pairs = logp + torch.tensor([0.3, -0.2, 0.1, 0.4]), torch.tensor([[0, 1]])
    found = []
    for value in values:
        config = LossConfig(**options, **{name: value})
        found.append(float(PairLoss(config)(logp, reference, lengths, pairs, None, 2.0).total))
        expected = preference_loss(
            *torch.tensor([[-4.0], [-6.5], [-3.9], [-6.0]]), kind=config.kind, f_divergence=config.f_divergence,
            chosen_length=lengths[:1], rejected_length=lengths[1:], mean_chosen_length=2.0, **{name: value},
        )  # fmt: skip
        assert found[-1] == pytest.approx(float(expected.loss), rel=1e-6)
    assert len(set(found)) == 3


def test_kinds_of_the_recipe_are_those_of_the_kernels() -> None:
    from fasttrain_kernels import KINDS

    assert set(LOSS_KINDS) == set(KINDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.kind=exo_pair"], "loss.label_smoothing: wanted a positive number for exo_pair"),
        (["loss.kind=bco_pair", "loss.f_divergence=forward_kl"], "loss.f_divergence: wanted"),
        (["loss.kind=[aot,sft]", "loss.use_weighting=true"], "loss.use_weighting: wanted false with aot, "),
        (
            ["loss.kind=sft", "loss.f_divergence=js_divergence"],
            "loss.f_divergence: wanted reverse_kl with sft",
        ),
        (["loss.kind=[sft]", "loss.ld_alpha=0.5"], "loss.ld_alpha: wanted null with sft, .* got 0.5"),
        (["loss.f_alpha=0.3"], "loss.f_alpha: wanted no value without loss.f_divergence alpha_divergence"),
        (["loss.discopop_tau=0.1"], "loss.discopop_tau: wanted no value without loss.kind discopop"),
        (
            ["loss.kind=cpo", "loss.simpo_gamma=1"],
            "loss.simpo_gamma: wanted no value without loss.kind simpo",
        ),
    ],
)
def test_contradicting_loss_options_are_a_users_mistake(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path, settings: list[str], message: str
) -> None:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 6)
    with pytest.raises(UserError, match=message):
        run(tiny_text, pairs, tmp_path / "run", *settings)
