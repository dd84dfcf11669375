"""The load-balancing loss of mixtures of experts: transformers' value, TRL's place in the loss, the same however a step is packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fasttrain.config import config_from_dict
from fasttrain.errors import UserError
from fasttrain.model.routing import balance_loss, balance_share, router_sums
from fasttrain.train.loop import train_dpo, train_sft


@pytest.fixture(scope="module")
def mixture(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_mixture(tmp_path_factory.mktemp("router") / "mixtral")


@pytest.fixture
def run(
    mixture: Path, text_pairs: Callable[..., Path], tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    pairs = text_pairs(tmp_path / "pairs.jsonl", 12)

    def steps(
        *settings: str, model: Path = mixture, train: Callable[..., Any] = train_dpo
    ) -> list[dict[str, Any]]:
        raw = {
            "model": {"name": str(model)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(pairs), "eval": str(pairs)},
            "loss": {"router_aux_weight": 0.5},
            "train": {
                "output": str(tmp_path / "run"), "max_steps": 3, "pairs_per_step": 6, "learning_rate": 1e-2,
                "warmup_ratio": 0.0, "schedule": "constant", "tokens_per_pack": 2000,
            },
            "track": [],
        }  # fmt: skip
        return train(config_from_dict(raw, settings), overwrite=True).metrics

    return steps


def test_sums_over_parts_of_a_batch_give_the_loss_and_gradient_that_transformers_computes_of_the_whole() -> (
    None
):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(5)
    uses_T = torch.tensor([3, 3, 3, 1, 0, 2, 1, 1, 0, 4, 1])
    layers = [torch.randn(11, 7, generator=generator, requires_grad=True) for _ in range(3)]
    # the batch in which every token stands as often as it is used
    written = tuple(layer.repeat_interleave(uses_T, dim=0) for layer in layers)
    theirs = load_balancing_loss_func(written, 7, 2)
    wanted = torch.autograd.grad(theirs, layers)
    parts = [
        router_sums([layer[rows] for layer in layers], uses_T[rows], 2)
        for rows in (slice(0, 4), slice(4, 5), slice(5, 11))
    ]
    total_V = torch.stack(parts).sum(0).detach()
    assert float(balance_loss(total_V)) == pytest.approx(theirs.item(), rel=1e-6)
    found = torch.autograd.grad(sum(balance_share(part, total_V) for part in parts), layers)
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.tokens_per_pack=110"],  # groups in parts, prompts again in each
        ["train.tokens_per_pack=110", "train.share_prefix=false"],
        ["train.tokens_per_pack=300", "train.gradient_checkpointing=true"],
    ],
    ids=str,
)
def test_packing_and_sharing_change_neither_the_router_loss_nor_its_gradient(
    run: Callable[..., Any], settings: list[str]
) -> None:
    whole, packed = run(), run(*settings)  # one pack a step: forward and backward at once
    for a, b in zip(whole, packed, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["aux_loss"] == pytest.approx(b["aux_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if a["step"] == 1 else 1e-4)
    assert whole[-1]["eval_loss"] == pytest.approx(packed[-1]["eval_loss"], rel=1e-5)
    assert whole[-1]["eval_aux_loss"] == pytest.approx(packed[-1]["eval_aux_loss"], rel=1e-5)


def test_the_router_loss_is_reported_always_and_added_by_its_weight(
    run: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    without = run("loss.router_aux_weight=0", "train.tokens_per_pack=110")
    assert "reported as aux_loss and not added; the model's own weight is 0.001" in capfd.readouterr().err
    added = run()
    assert "not added" not in capfd.readouterr().err
    assert without[0]["aux_loss"] == pytest.approx(added[0]["aux_loss"], rel=1e-5)
    assert added[0]["loss"] - without[0]["loss"] == pytest.approx(0.5 * added[0]["aux_loss"], rel=1e-5)
    assert added[0]["grad_norm"] != pytest.approx(without[0]["grad_norm"], rel=1e-3)


def test_sft_reports_and_adds_the_router_loss_too(run: Callable[..., Any]) -> None:
    whole, packed = run(train=train_sft), run("train.tokens_per_pack=110", train=train_sft)
    plain = run("loss.router_aux_weight=0", train=train_sft)
    assert whole[0]["loss"] - plain[0]["loss"] == pytest.approx(0.5 * plain[0]["aux_loss"], rel=1e-5)
    for a, b in zip(whole, packed, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_router_loss_for_a_model_without_one_is_refused(run: Callable[..., Any], tiny_text: Path) -> None:
    with pytest.raises(UserError, match=r"loss.router_aux_weight: wanted a mixture of experts .* 'llama'"):
        run(model=tiny_text)
    assert "aux_loss" not in run("loss.router_aux_weight=0", model=tiny_text)[0]
