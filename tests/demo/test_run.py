"""The demo end to end, shortened: sampled pairs, DPO through the public API, answers before and after."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

from fasttrain import UserError, load_config
from fasttrain.demo.run import MODEL, DemoResult, run_demo

PROMPTS, QUESTIONS = 160, 120


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "new" / "demo"
    lines: list[str] = []
    result = run_demo(folder, prompts=PROMPTS, questions=QUESTIONS, echo=lines.append)
    return result, folder, "\n".join(lines)


@pytest.mark.slow
def test_dpo_mends_the_habits_far_beyond_the_interval(demo: tuple[DemoResult, Path, str]) -> None:
    result, *_ = demo
    assert result.before.accuracy < 0.4
    assert result.after.accuracy > result.before.accuracy + 0.25
    assert result.after.interval[0] > result.before.interval[1] + 0.1


@pytest.mark.slow
def test_the_account_tells_what_was_measured(demo: tuple[DemoResult, Path, str]) -> None:
    result, folder, text = demo
    for shown in (result.before, result.after):
        low, high = shown.interval
        assert (
            f"{shown.accuracy:.1%} of {QUESTIONS} answers right (95 % interval {low:.1%} to {high:.1%})"
            in text
        )
    assert f"{result.tokens:,}" in text
    assert f"{result.tokens_unshared:,}" in text
    assert str(folder / "run") in text
    assert f"DPO on the {result.data.pairs:,} pairs" in text
    assert (folder / "recipe.yaml").read_text().splitlines()[3] in text


@pytest.mark.slow
def test_tokens_are_those_of_the_metrics_file(demo: tuple[DemoResult, Path, str]) -> None:
    result, folder, _ = demo
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    pairs = (folder / "data" / "pairs.jsonl").read_text().splitlines()
    assert sum(line["pairs"] for line in metrics) == len(pairs) == result.data.pairs > PROMPTS / 3
    assert result.tokens == sum(line["tokens"] for line in metrics)
    assert result.tokens_unshared == sum(line["tokens_unshared"] for line in metrics) > 3 * result.tokens


@pytest.mark.slow
def test_the_adapter_in_the_run_folder_loads_onto_the_shipped_model(
    demo: tuple[DemoResult, Path, str],
) -> None:
    _, folder, _ = demo
    base = LlavaForConditionalGeneration.from_pretrained(MODEL)
    tuned = PeftModel.from_pretrained(base, folder / "run" / "final")
    moved = [value.abs().max() for name, value in tuned.state_dict().items() if "lora_B" in name]
    assert moved and all(value > 0 for value in moved)


@pytest.mark.slow
def test_the_habit_of_saying_yes_is_gone_in_popes_form_through_the_real_command(tmp_path: Path) -> None:
    folder, told = tmp_path / "demo", []
    run_demo(folder, questions=QUESTIONS, echo=told.append)  # all its prompts: a shortened run still says yes
    text = "\n".join(told)
    (command,) = [
        line.strip() for line in text.splitlines() if line.strip().startswith("fasttrain eval pope")
    ]
    words = shlex.split(command)
    scores = {}
    for name in ("before", "after"):
        line = [word for word in words if name == "after" or word not in ("-a", str(folder / "run"))]
        line[line.index("-o") + 1] = str(tmp_path / name)
        subprocess.run([sys.executable, "-m", *line], check=True, capture_output=True)
        scores[name] = json.loads((tmp_path / name / "scores.json").read_text())["held_out"]
    before, after = scores["before"], scores["after"]
    assert before["n"] == after["n"] == QUESTIONS
    assert before["yes_ratio"] > 0.85 and before["accuracy"] < 0.65
    assert 0.3 < after["yes_ratio"] < 0.7 and after["accuracy"] > before["accuracy"] + 0.2
    assert after["f1"] > before["f1"] + 0.1


@pytest.mark.slow
def test_the_demo_can_be_run_again_and_gives_the_same(demo: tuple[DemoResult, Path, str]) -> None:
    result, folder, _ = demo
    threads = torch.get_num_threads()
    again = run_demo(folder, prompts=PROMPTS, questions=QUESTIONS, echo=lambda line: None)
    assert torch.get_num_threads() == threads
    assert (again.before, again.after) == (result.before, result.after)
    assert [line["loss"] for line in again.run.metrics] == [line["loss"] for line in result.run.metrics]


def test_a_folder_with_other_contents_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="wanted a new folder or an earlier demo's"):
        run_demo(tmp_path)
    assert (tmp_path / "data" / "precious.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        run_demo(tmp_path / "file" / "demo")


def test_too_few_questions_for_a_single_pair_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wanted at least one pair, got none"):
        run_demo(tmp_path / "demo", prompts=1, questions=8, echo=lambda line: None)


def test_a_demo_that_was_interrupted_at_once_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "it's a demo: #1"
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("fasttrain.demo.run.train_dpo", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_demo(folder, prompts=16, questions=8, echo=lambda line: None)
    assert load_config(folder / "recipe.yaml").data.train == str(folder / "data" / "pairs.jsonl")
