"""Meaning of a step: how pairs are packed, shared, checkpointed or ordered changes neither loss nor gradient."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BOTH = pytest.mark.parametrize("kind", ["text", "llava"])


@pytest.fixture
def recipe(
    tiny_text: Path,
    tiny_llava: Path,
    text_pairs: Callable[..., Path],
    vision_pairs: Callable[..., Path],
    tmp_path: Path,
) -> Callable[..., list[dict[str, Any]]]:
    """Runs a recipe on the text model or the LLaVA and returns its metrics."""
    files: dict[str, Path] = {}

    def run(kind: str, *overrides: str, pairs: Path | None = None) -> list[dict[str, Any]]:
        from fasttrain import train_dpo
        from fasttrain.config import config_from_dict

        if kind not in files:
            folder = tmp_path / f"data-{kind}"
            folder.mkdir()
            make = (
                (lambda: text_pairs(folder / "pairs.jsonl", 21))
                if kind == "text"
                else (lambda: vision_pairs(folder, 21))
            )
            files[kind] = make()
        raw = {
            "model": {"name": str(tiny_text if kind == "text" else tiny_llava)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(pairs or files[kind]), "workers": 0},
            "train": {
                "output": str(tmp_path / "run"), "epochs": 2, "pairs_per_step": 8, "learning_rate": 1e-2,
                "tokens_per_pack": 100_000, "warmup_ratio": 0.0, "schedule": "constant",
            },
            "track": [],
        }  # fmt: skip
        return train_dpo(config_from_dict(raw, overrides), overwrite=True).metrics

    run.files = files  # type: ignore[attr-defined]
    return run


def assert_same(ours: list[dict[str, Any]], truth: list[dict[str, Any]], relative: float = 1e-5) -> None:
    """Loss and gradient norm agree; later steps allow for updates that rounding bent: Adam divides by small numbers."""
    assert len(ours) == len(truth) > 3
    for number, (a, b) in enumerate(zip(ours, truth)):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=relative if number == 0 else 2e-4), (number, name)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-4)


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        "train.tokens_per_pack=150",
        "train.tokens_per_pack=40",
        "train.share_prefix=false",
        "train.gradient_checkpointing=true",
        "data.workers=1",
        pytest.param("train.compile=true", marks=pytest.mark.slow),
    ],
)
def test_how_a_step_runs_does_not_change_it(recipe: Callable[..., Any], kind: str, change: str) -> None:
    truth = recipe(kind)
    assert truth[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert truth[-1]["loss"] < 0.68  # the steps moved the policy: later steps compare more than ln 2
    assert_same(recipe(kind, change), truth)


def test_full_fine_tuning_is_invariant_too(recipe: Callable[..., Any]) -> None:
    settings = ["lora=null", "train.learning_rate=2e-4", "model.train_projector=true"]
    truth = recipe("llava", *settings)
    assert_same(recipe("llava", *settings, "train.share_prefix=false", "train.tokens_per_pack=60"), truth)


def test_packs_without_images_add_nothing_where_only_the_vision_part_trains(
    recipe: Callable[..., Any], vision_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mixed").mkdir()
    pairs = vision_pairs(tmp_path / "mixed", 21, images=(1, 0))
    settings = ["lora.targets=[linear_1,linear_2]", "train.shuffle=false"]
    truth = recipe("llava", *settings, pairs=pairs)
    assert truth[0]["grad_norm"] > 0
    assert_same(recipe("llava", *settings, "train.tokens_per_pack=40", pairs=pairs), truth)


def test_rows_in_another_order_within_a_step_give_the_same_step(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Grouping and the order of completions in a group depend on row order; a step of all pairs does not."""
    settings = ["train.pairs_per_step=1000", "train.epochs=5", "train.shuffle=false"]
    truth = recipe("llava", *settings)
    file = recipe.files["llava"]  # type: ignore[attr-defined]
    rows = file.read_text().splitlines()
    random.Random(5).shuffle(rows)
    shuffled = file.with_name("shuffled.jsonl")
    shuffled.write_text("\n".join(rows) + "\n")
    assert_same(recipe("llava", *settings, pairs=shuffled), truth)


def test_grouped_rows_cost_less_but_weigh_the_same(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Rows that share a prompt give the loss of rows run alone, with fewer tokens."""
    settings = ["train.pairs_per_step=1000", "train.epochs=5"]
    truth = recipe("text", *settings)
    alone = recipe("text", *settings, "train.share_prefix=false")
    assert alone[0]["tokens"] > truth[0]["tokens"]
    assert alone[0]["tokens_unshared"] == truth[0]["tokens_unshared"]
    assert_same(alone, truth)


def test_tokens_and_images_are_counted_once_per_group(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder sees prompt + sum of completions per group; the vision tower sees every image once per step."""
    from transformers.models.clip.modeling_clip import CLIPVisionModel
    from transformers.models.llama.modeling_llama import LlamaModel

    from fasttrain.train.loop import Trainer

    images, tokens, trainers = [], [], []
    tower, decoder, init = CLIPVisionModel.forward, LlamaModel.forward, Trainer.__init__

    def count_images(self: Any, pixel_values: Any, *rest: Any, **options: Any) -> Any:
        if not pixel_values.is_meta:  # the plan's passes, which compute nothing
            images.append(len(pixel_values))
        return tower(self, pixel_values, *rest, **options)

    def count_tokens(self: Any, *rest: Any, **options: Any) -> Any:
        if not options["inputs_embeds"].is_meta:
            tokens.append(options["inputs_embeds"].shape[1])
        return decoder(self, *rest, **options)

    def remember(self: Any, job: Any, *rest: Any) -> None:
        trainers.append(job)
        init(self, job, *rest)

    settings = ["train.pairs_per_step=1000", "train.max_steps=3"]
    recipe("llava", *settings)  # fills the cache
    monkeypatch.setattr(CLIPVisionModel, "forward", count_images)
    monkeypatch.setattr(LlamaModel, "forward", count_tokens)
    monkeypatch.setattr(Trainer, "__init__", remember)
    metrics = recipe("llava", *settings)
    data = trainers[0].train
    expected = sum(int(data.lengths(number).sum()) for number in range(len(data)))
    images_in_data = sum(data.image_count(number) for number in range(len(data)))
    assert [line["tokens"] for line in metrics] == [expected] * 3
    # three steps, plus what is asked of the model at load with a few tokens (its logits, its hidden states twice): no reference
    assert sorted(tokens, reverse=True)[:3] == [expected] * 3
    assert len(tokens) == 6 and max(sorted(tokens)[:3]) <= 8
    assert images == [images_in_data] * 3


def test_metrics_file_is_what_train_dpo_returns(recipe: Callable[..., Any], tmp_path: Path) -> None:
    metrics = recipe("text")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == metrics
