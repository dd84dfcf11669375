"""However many ranks share a step, and whatever ZeRO partitions, loss and gradient are those of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain.train.loop import train_dpo

pytestmark = pytest.mark.forks
# Tiny weights too are held in parts: DeepSpeed keeps those below 100,000 elements whole.
IN_PARTS = {"stage3_param_persistence_threshold": 0}
ON_CPU = {"offload_optimizer": {"device": "cpu"}}


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
        for name in ("pairs", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
    assert ours[-1]["eval_loss"] == pytest.approx(truth[-1]["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "zero", "cases"),
    [
        ("null", {}, ["images", "unshared", "coupled", "mixture"]),
        ("2", {}, ["text", "full", "split", "projector rests", "tower alone", "nf4", "mixture"]),
        ("2", ON_CPU, ["projector rests"]),
        ("3", IN_PARTS, ["full", "few", "projector rests", "tower alone", "unshared", "mixture"]),
        ("3", IN_PARTS, ["experts"]),
        ("3", {**IN_PARTS, **ON_CPU, "offload_param": {"device": "cpu"}}, ["full", "projector rests"]),
    ],
)
def test_two_ranks_take_the_steps_of_one_process(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], deepspeed_config: Callable[..., str], stage: str,
    zero: dict[str, Any], cases: list[str],
) -> None:  # fmt: skip
    truth, one = {}, {}
    for case in cases:
        config = recipes(case, "one")
        train_dpo(config)
        truth[case] = lines(config)
        one[case] = config
        assert truth[case][-1]["loss"] != pytest.approx(truth[case][0]["loss"], rel=1e-3), (
            "nothing was learned"
        )
    settings = [f"distributed.zero_stage={stage}", *([deepspeed_config(**zero)] if zero else [])]
    shared = [recipes(case, "two", *settings) for case in cases]

    def body() -> None:
        for config in shared:
            train_dpo(config)

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    for case, config in zip(cases, shared, strict=True):
        assert_same(lines(config), truth[case])
        assert_same_changes(config, one[case])
        if (
            case == "few"
        ):  # idle ranks repeat work, and weights are in parts: neither changes what is reported
            for ours, alone in zip(lines(config), truth[case], strict=True):
                assert ours["tokens"] == alone["tokens"]
                assert ours["tflops"] * ours["step_s"] == pytest.approx(alone["tflops"] * alone["step_s"])


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
@pytest.mark.parametrize(
    ("family", "stage", "more"),
    [
        ("Qwen2.5-VL", "3", []),
        # a weight of the embeddings read outside of them
        ("Gemma 4", "3", []),
        # positions of the tower read by the module around them, already where the ranks' images are checked
        ("GLM-4.1V", "3", []),
        # features of several layers of the tower; ranks with images beside ranks without
        ("Qwen3-VL", "2", ["model.train_projector=true", "train.pairs_per_step=2", "train.max_steps=9"]),
        ("Mllama", "null", []),
    ],
)
def test_other_families_take_the_steps_of_one_process(
    family: str, stage: str, more: list[str], tiny_models: ModuleType, tiny_families: ModuleType,
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], deepspeed_config: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    """Mllama runs other layers with images than without: only where ranks need not run the same modules."""
    # one process runs fused norms, ZeRO-3 transformers' own: steps of the usual size would amplify the rounding
    name = f"model.name={tiny_families.save(tiny_models, tmp_path / 'model', family)}"
    changes = [name, "train.learning_rate=1e-3", *more]
    one = recipes("images", "one", *changes)
    train_dpo(one)
    settings = [] if stage == "null" else [f"distributed.zero_stage={stage}", deepspeed_config(**IN_PARTS)]
    two = recipes("images", "two", *changes, *settings)
    ended = run_ranks(lambda: train_dpo(two))
    assert ended.codes == [0, 0], ended.stderr
    assert_same(lines(two), lines(one))
    if family == "Mllama":
        refused = run_ranks(lambda: train_dpo(recipes("images", "zero", name, "distributed.zero_stage=2")))
        assert "distributed.zero_stage: wanted null for MllamaFor" in refused.stderr


@pytest.mark.slow
def test_experts_load_under_zero_3_whichever_way_they_lie_in_their_files(
    tiny_models: ModuleType,
    tiny_families: ModuleType,
    recipes: Callable[..., Any],
    run_ranks: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Qwen3-VL-MoE's, as its publisher has them and as transformers saves them; of a part no shape told which."""
    from safetensors.torch import load_file, save_file

    saved = tiny_families.save(tiny_models, tmp_path / "saved", "Qwen3-VL-MoE")
    published = Path(shutil.copytree(saved, tmp_path / "published"))
    weights = load_file(saved / "model.safetensors")
    turned = {name: x.mT.contiguous() if ".mlp.experts." in name else x for name, x in weights.items()}
    save_file(turned, published / "model.safetensors", metadata={"format": "pt"})
    changes = ["train.max_steps=1", "data.eval=null"]
    configs = [
        recipes("text", folder.name, f"model.name={folder}", "distributed.zero_stage=3", *changes)
        for folder in (saved, published)
    ]
    ended = run_ranks(lambda: [train_dpo(config) for config in configs] and None)
    assert ended.codes == [0, 0], ended.stderr
    truth = recipes("text", "one", f"model.name={saved}", *changes)
    train_dpo(truth)
    for config in configs:
        for name in ("logps/chosen", "grad_norm"):
            assert lines(config)[0][name] == pytest.approx(lines(truth)[0][name], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_another_stage_and_another_number_of_ranks(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], deepspeed_config: Callable[..., str]
) -> None:
    """One process, ZeRO-3 on two ranks with its optimizer on the CPU, ZeRO-2 on three, one process: one process's losses."""
    truth = recipes("split", "one")
    train_dpo(truth)

    def leg(steps: int, stage: str, *settings: str) -> Any:
        return recipes(
            "split", "legs", f"train.max_steps={steps}", f"distributed.zero_stage={stage}", *settings
        )

    train_dpo(leg(2, "null"))
    for config, size in ((leg(4, "3", deepspeed_config(**ON_CPU)), 2), (leg(6, "2"), 3)):
        ended = run_ranks(lambda config=config: train_dpo(config, resume=True), size)
        assert ended.codes == [0] * size, ended.stderr
    train_dpo(recipes("split", "legs"), resume=True)
    assert_same(lines(recipes("split", "legs")), lines(truth))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "legs"), [("2", {"again": 2, "plain": 1}), ("3", {"again": 2, "three": 3})]
)
def test_8_bit_states_resume_to_the_same_bits_and_on_other_ranks_to_8_bits(
    recipes: Callable[..., Any],
    run_ranks: Callable[..., Any],
    stage: str,
    legs: dict[str, int],
) -> None:
    """Scales belong to blocks of what a rank holds: another cut rounds the moments anew."""
    states = ["train.optimizer=adamw_8bit", "lora.rank=64", "lora.alpha=64", "train.learning_rate=1e-3"]
    zero = [f"distributed.zero_stage={stage}"]
    one, whole = recipes("text", "one", *states), recipes("text", "two", *states, *zero)
    train_dpo(one)
    assert run_ranks(lambda: train_dpo(whole)).codes == [0, 0]
    truth = lines(one)

    def close(found: list[dict[str, Any]]) -> bool:
        assert len(found) == len(truth) == 9 and truth[0]["loss"] - truth[-1]["loss"] > 0.1
        return all(a["loss"] == pytest.approx(b["loss"], rel=0.02) for a, b in zip(found, truth, strict=True))

    assert close(lines(whole))
    for tag, size in legs.items():
        start = recipes("text", tag, *states, *zero, "train.max_steps=4")
        assert run_ranks(lambda config=start: train_dpo(config)).codes == [0, 0]
        rest = recipes("text", tag, *states, *(zero if size > 1 else []))
        ended = run_ranks(lambda config=rest: train_dpo(config, resume=True), size)
        assert ended.codes == [0] * size, ended.stderr
        assert close(lines(rest))
        if tag == "again":
            same = [
                (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
                for a, b in zip(lines(rest), lines(whole))
            ]
            assert all(same)
