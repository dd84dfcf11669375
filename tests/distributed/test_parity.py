"""However many ranks share a step, and whatever ZeRO partitions, loss and gradient are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.config import config_from_dict
from fasttrain.ranks import ranks
from fasttrain.train.loop import train_dpo

MIXTURE = "mixtral"
MIXED = "llava"  # its pairs: prompts with one image, two and none

CASES: dict[str, tuple[str, list[str]]] = {
    "text": ("text", []),
    "images": (MIXED, []),
    "full": (MIXED, ["lora=null", "model.train_projector=true", "train.learning_rate=1e-4"]),
    "split": (MIXED, ["train.tokens_per_pack=40", "train.gradient_checkpointing=true", "model.train_projector=true"]),
    "unshared": (MIXED, ["train.share_prefix=false"]),
    "coupled": ("text", ["loss.kind=aot"]),
    "projector rests": (  # some steps have no image: the projector's gradient is zero, not the last step's
        MIXED, ["model.train_projector=true", "train.pairs_per_step=1", "train.max_steps=9"],
    ),
    "mixture": (MIXTURE, ["loss.router_aux_weight=0.5", "train.tokens_per_pack=110"]),
    "few": ("text", ["train.pairs_per_step=1", "data.limit_pairs=5", "train.epochs=4"]),  # a group a step
}  # fmt: skip


@pytest.fixture
def recipes(
    tiny_text: Path,
    tiny_llava: Path,
    text_pairs: Callable[..., Path],
    vision_pairs: Callable[..., Path],
    tiny_models: Any,
    tmp_path: Path,
) -> Callable[[str, str], Any]:
    text = text_pairs(tmp_path / "text.jsonl", 21)
    mixture = tiny_models.build_mixture(tmp_path / "mixture")
    models = {"text": tiny_text, MIXED: tiny_llava, MIXTURE: mixture}
    files = {"text": text, MIXTURE: text, MIXED: vision_pairs(tmp_path / "images", 21)}

    def make(case: str, tag: str, *overrides: str) -> Any:
        kind, changes = CASES[case]
        raw = {
            "model": {"name": str(models[kind])},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(files[kind]), "eval": str(files[kind]), "workers": 0},
            "train": {
                "output": str(tmp_path / f"{case}-{tag}"), "epochs": 3, "pairs_per_step": 8, "learning_rate": 1e-2,
                "tokens_per_pack": 150, "warmup_ratio": 0.0, "schedule": "constant", "checkpoint_every": 4,
            },
            "track": [],
        }  # fmt: skip
        return config_from_dict(raw, [*changes, *overrides])

    return make


def lines(config: Any) -> list[dict[str, Any]]:
    path = Path(config.train.output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_changes(ours: Any, truth: Any) -> None:
    """The pairs that moved most and least of all ranks' pairs."""
    paths = [Path(config.train.output) / "pair_changes.jsonl" for config in (ours, truth)]
    for a, b in zip(*(path.read_text().splitlines() for path in paths), strict=True):
        moved = [
            [chosen - rejected for _, _, chosen, rejected in json.loads(line)["pairs"]] for line in (a, b)
        ]
        assert moved[0] == pytest.approx(moved[1], abs=1e-3)


def assert_same(ours: list[dict[str, Any]], truth: list[dict[str, Any]]) -> None:
    assert len(ours) == len(truth) >= 9
    for a, b in zip(ours, truth, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if a["step"] == 1 else 1e-4), a[
            "step"
        ]
        assert a["pairs"] == b["pairs"]
    assert ours[-1]["eval_loss"] == pytest.approx(truth[-1]["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "cases"),
    [
        ("null", ["images", "unshared", "coupled", "mixture"]),
        ("2", ["text", "full", "split", "projector rests", "mixture"]),
        ("3", ["full", "few", "projector rests", "mixture"]),
    ],
)
def test_two_ranks_take_the_steps_of_one_process(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], stage: str, cases: list[str]
) -> None:
    truth, one = {}, {}
    for case in cases:
        config = recipes(case, "one")
        train_dpo(config)
        truth[case] = lines(config)
        one[case] = config
        assert truth[case][-1]["loss"] != pytest.approx(truth[case][0]["loss"], rel=1e-3), (
            "nothing was learned"
        )
    shared = [recipes(case, "two", f"distributed.zero_stage={stage}") for case in cases]

    def body() -> None:
        for config in shared:
            train_dpo(config)

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    for case, config in zip(cases, shared, strict=True):
        assert_same(lines(config), truth[case])
        assert_same_changes(config, one[case])


def test_ranks_that_tokenize_as_steps_ask_take_the_same_steps(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a large pair file, of which a short run sees a part."""
    from fasttrain.data import prepare, prepared

    changes = [
        "train.pairs_per_step=2",
        "train.max_steps=1",
        "data.eval=null",
        "train.gradient_checkpointing=false",
    ]
    alone = recipes("images", "one", *changes)
    train_dpo(alone)
    monkeypatch.setattr(prepare, "LAZY_FROM", 1)
    monkeypatch.setattr(prepared.PreparedData, "complete", lambda *given: pytest.fail("all were tokenized"))
    shared = recipes("images", "two", *changes, "data.workers=1")
    ended = run_ranks(lambda: train_dpo(shared) and None)
    assert ended.codes == [0, 0], ended.stderr
    (ours,), (truth,) = lines(shared), lines(alone)
    assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-5)
    assert ours["pairs"] == truth["pairs"]


@pytest.mark.slow
def test_a_run_goes_on_with_another_stage_and_another_number_of_ranks(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any]
) -> None:
    """One process, then ZeRO-3 on two ranks, then ZeRO-2 on two, then one process: the losses of one process throughout."""
    truth = recipes("split", "one")
    train_dpo(truth)

    def leg(steps: int, stage: str) -> Any:
        return recipes("split", "legs", f"train.max_steps={steps}", f"distributed.zero_stage={stage}")

    train_dpo(leg(2, "null"))
    for steps, stage in ((4, "3"), (6, "2")):
        config = leg(steps, stage)
        ended = run_ranks(lambda config=config: train_dpo(config, resume=True))
        assert ended.codes == [0, 0], ended.stderr
    train_dpo(recipes("split", "legs"), resume=True)
    assert_same(lines(recipes("split", "legs")), lines(truth))


@pytest.mark.slow
def test_zero_3_gathers_a_frozen_head_once_a_pass_and_never_in_the_backward(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    # the cache is full: from here on passes are steps
    train_dpo(recipes("images", "one", "train.max_steps=1", "data.eval=null"))
    config = recipes("images", "two", "train.max_steps=2", "data.eval=null", "distributed.zero_stage=3")

    def body() -> None:
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            PartitionedParameterCoordinator as Gathers,
        )

        from fasttrain.model.head import LogprobHead
        from fasttrain.train.zero_engine import ZeroEngine

        fetch, passes, backward = Gathers.fetch_sub_module, ZeroEngine.forward, ZeroEngine.backward
        seen: list[str] = []

        def counted(self: Any, module: Any, forward: bool) -> Any:
            if isinstance(module, LogprobHead):
                seen.append("gathered forward" if forward else "gathered backward")
            return fetch(self, module, forward)

        def told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                seen.append(name)
                return call(*arguments, **options)

            return wrapped

        Gathers.fetch_sub_module = counted
        ZeroEngine.forward, ZeroEngine.backward = told("pass", passes), told("backward", backward)
        train_dpo(config)
        first = seen.index("pass")  # before it the head was compared with the model's own logits
        (tmp_path / f"seen{ranks().rank}.json").write_text(json.dumps(seen[first:]))

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        assert seen.count("backward") >= 4 and "gathered backward" not in seen
        assert seen.count("gathered forward") == seen.count("pass")  # a split group's packs pass twice
