"""The watch on benchmarks while training: the live policy's score, and not a bit of the training changed by it."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain import cli, train_dpo
from fasttrain.config import config_from_dict
from fasttrain.errors import UserError

CLOCK = {
    "step_s", "data_s", "forward_s", "backward_s", "update_s", "pairs_per_s", "tokens_per_s", "tflops", "mfu", "peak_bytes",
}  # fmt: skip


@pytest.fixture
def pope(tmp_path: Path, tiny_models: ModuleType) -> Path:
    """Two splits of eight questions about four images; half of them stand in both."""
    folder = tmp_path / "pope"
    for number in range(4):
        tiny_models.draw_image(folder / "val2014" / f"{number}.png", seed=number)
    for split, colours in (("random", "red green blue left"), ("popular", "red green right lowest")):
        rows = [
            {
                "question_id": 10 * number + image,
                "image": f"{image}.png",
                "text": f"is the {colour} bar in the image?",
                "label": "yes" if (number + image) % 2 else "no",
            }
            for number, colour in enumerate(colours.split())
            for image in range(2 * (number % 2), 2 * (number % 2) + 2)
        ]
        tiny_models.write_rows(folder / f"coco_pope_{split}.json", rows)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tiny_llava: Path, vision_pairs: Callable[..., Path]) -> Callable[..., Any]:
    (tmp_path / "data").mkdir()
    pairs = vision_pairs(tmp_path / "data", 16)

    def make(output: str, *overrides: str, watch: list[str] | None = None) -> Any:
        raw = {
            "model": {"name": str(tiny_llava), "train_projector": True},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.2},
            "data": {"train": str(pairs), "eval": [str(pairs), *(watch or [])], "workers": 1},
            "train": {
                "output": str(tmp_path / output), "max_steps": 5, "pairs_per_step": 5, "learning_rate": 3e-2,
                "projector_learning_rate": 1e-2, "tokens_per_pack": 200, "eval_every": 2, "checkpoint_every": 2,
                "gradient_checkpointing": True,
            },
            "track": [],
        }  # fmt: skip
        return config_from_dict(raw, overrides)

    return make


def numbers(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is neither the clock's nor the watch's."""
    return [
        {
            key: value
            for key, value in line.items()
            if key not in CLOCK and not key.startswith(("eval_pope", "eval_mmb"))
        }
        for line in metrics
    ]


def test_training_is_the_same_bit_for_bit_with_the_watch_and_its_scores_are_those_of_eval(
    recipe: Callable[..., Any], pope: Path, tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain = train_dpo(recipe("plain"))
    watched = train_dpo(recipe("watched", watch=[str(pope)]))
    assert numbers(watched.metrics) == numbers(plain.metrics)
    name = "adapter_model.safetensors"
    assert (watched.adapter / name).read_bytes() == (plain.adapter / name).read_bytes()
    lines = {line["step"]: line for line in watched.metrics if "eval_pope/f1" in line}
    assert list(lines) == [2, 4, 5] and all("eval_loss" in line for line in lines.values())
    assert (
        len({lines[step]["eval_pope/mean_answer_chars"] for step in lines}) > 1
    )  # it is the live policy that answers
    for output, adapter in (("base", ()), ("tuned", ("-a", watched.folder))):
        words = ["eval", "pope", "-m", tiny_llava, *adapter, "--data", pope, "-o", tmp_path / output]
        monkeypatch.setattr(sys, "argv", ["fasttrain", *map(str, words)])
        cli.main()
    before, after = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("base", "tuned"))
    assert lines[5]["eval_pope/f1"] == pytest.approx(after["mean_f1"])
    assert lines[5]["eval_pope/f1_change"] == pytest.approx(after["mean_f1"] - before["mean_f1"])
    for key in ("accuracy", "yes_ratio", "mean_answer_chars"):
        mean = (after["random"][key] + after["popular"][key]) / 2
        assert lines[5][f"eval_pope/{key}"] == pytest.approx(mean)
    assert json.loads((watched.folder / "watch_start.json").read_text())["pope"]["f1"] == pytest.approx(
        before["mean_f1"]
    )


def test_a_resumed_run_watches_as_the_undisturbed_one(recipe: Callable[..., Any], pope: Path) -> None:
    whole = train_dpo(recipe("whole", watch=[str(pope)]))
    train_dpo(recipe("parts", "train.max_steps=2", watch=[str(pope)]))
    resumed = train_dpo(recipe("parts", watch=[str(pope)]), resume=True)

    def watch(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in line.items() if key not in CLOCK}
            for line in metrics
            if line["step"] > 2
        ]

    assert watch(resumed.metrics)[:2] == watch(whole.metrics)[:2]  # the schedule of step 5 is another


def test_damaged_scores_of_the_start_are_found_again(recipe: Callable[..., Any], pope: Path) -> None:
    settings = recipe("whole", "train.max_steps=1", watch=[str(pope)])
    whole = train_dpo(settings)
    start = whole.folder / "watch_start.json"
    before = start.read_text()
    for damage in ("", '{"pope": {}}', "[]"):
        start.write_text(damage)
        train_dpo(settings, resume=True)
        assert start.read_text() == before


def test_mmbench_is_watched_by_the_circular_rule_and_alone(
    recipe: Callable[..., Any], tmp_path: Path, tiny_models: ModuleType
) -> None:
    image = base64.b64encode(tiny_models.draw_image(tmp_path / "x.png", seed=1).read_bytes()).decode()
    folder = tmp_path / "mmbench"
    folder.mkdir()
    rows = [f"{n}\tthe bar?\tred\tblue\tleft\tA\t{image}" for n in range(3)]
    (folder / "mmbench_dev_en.tsv").write_text(
        "\n".join(["index\tquestion\tA\tB\tC\tanswer\timage", *rows]) + "\n"
    )
    config = recipe("run", f"data.eval={folder}", "data.eval_questions=2", "train.max_steps=1")
    (line,) = train_dpo(config).metrics
    assert {"eval_mmbench/accuracy", "eval_mmbench/accuracy_change", "eval_mmbench/undecided"} <= set(line)
    assert line["eval_mmbench/needs_judge"] <= 6 and "eval_loss" not in line


def test_mistakes_in_a_watched_folder_stop_before_training(
    recipe: Callable[..., Any], pope: Path, tmp_path: Path
) -> None:
    (pope / "val2014" / "2.png").unlink()
    with pytest.raises(
        UserError, match=r"coco_pope_random.json line \d: image: wanted an existing image file"
    ):
        train_dpo(recipe("run", watch=[str(pope)]))
    with pytest.raises(
        UserError, match=r"data.eval: wanted .* or one with POPE's coco_pope_\*\.json or .*val2014"
    ):
        train_dpo(recipe("run", watch=[str(pope / "val2014")]))
    with pytest.raises(UserError, match=r"data.eval_questions: wanted at least 1"):
        recipe("run", "data.eval_questions=0")
    for setting in ("data.eval_questions=3", "data.eval_prompt_suffix=Answer."):
        with pytest.raises(
            UserError, match=rf"{setting.partition('=')[0]}: wanted null without a benchmark folder"
        ):
            train_dpo(recipe("run", setting))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_watched_questions(recipe: Callable[..., Any], pope: Path) -> None:
    from fasttrain.train.dry_run import dry_run
    from fasttrain.train.losses import PairLoss

    config = recipe("run", watch=[str(pope)])
    report = dry_run(config, PairLoss(config.loss), resume=False, overwrite=False)
    assert "watch       pope: 16 questions, 12 of them different" in report
