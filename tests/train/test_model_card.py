"""The model card tells the run's own figures, where its data came from, and under which terms; estimates say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain import train_dpo
from fasttrain.config import config_from_dict
from fasttrain.files import hash_file


@pytest.fixture
def card(tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[str, Any]]:
    def make(name: str, sections: dict[str, Any] | None = None, **keys: Any) -> tuple[str, Any]:
        path = text_pairs(tmp_path / name, 8)
        rows = [json.loads(line) | keys for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "model": {"name": str(tiny_text)},
            "lora": {"rank": 3, "alpha": 6},
            "data": {"train": str(path), "workers": 0},
            "train": {"output": str(tmp_path / f"run-{name}"), "epochs": 1, "pairs_per_step": 4, "seed": 7},
            "track": [],
        }
        result = train_dpo(config_from_dict(recipe | (sections or {})))
        return (result.adapter / "README.md").read_text(), (result.metrics, path)

    return make


def test_figures_are_the_runs_own(card: Any) -> None:
    text, (metrics, path) = card("pairs.jsonl")
    assert f"`pairs.jsonl`, BLAKE2b-128 `{hash_file(path)}`" in text
    assert "8 pairs in" in text and "LoRA rank 3, alpha 6" in text and "seed 7" in text
    for name in ("loss", "rewards/margins"):
        assert f"| {name} | {metrics[0][name]:.4f} | {metrics[-1][name]:.4f} |" in text
    assert f"{sum(line['step_s'] for line in metrics):,.0f} s in logged steps" in text
    assert "Energy: not metered." in text
    assert "The rows do not say where they came from" in text
    assert "no source with known terms was recognised" in text
    assert text.startswith("---\nlibrary_name: peft\n")  # the hub takes no folder as base_model


def test_several_losses_and_full_fine_tuning_are_named_as_they_are(card: Any) -> None:
    text, _ = card("pairs.jsonl", {"lora": None, "loss": {"kind": ["sigmoid", "sft"], "beta": 0.2}})
    assert "\nthe whole language model; loss `sigmoid` + `sft`, beta 0.2; " in text


def test_what_the_rows_say_of_themselves_is_counted_and_their_terms_are_told(card: Any) -> None:
    rule = {"score": "hcc", "margin": 2.0}
    text, _ = card(
        "made.jsonl",
        source="SciGraphQA\n# a [link](x) <img>",
        annotator_version="judge-1",
        rule=rule,
        flipped=True,
    )
    assert (
        r"* source: SciGraphQA \# a \[link\](x) \<img\> (8)" in text
    )  # text in one line, whatever a row holds
    assert "* graded by: judge-1 (8)" in text
    assert "* rule: score hcc, margin 2.0 (8)" in text
    assert "* labels: swapped on purpose (8)" in text
    assert "its data card MIT" in text and "no source with known terms" not in text


@pytest.mark.parametrize("family", ["text", "LLaVA", "LLaVA-NeXT", "Gemma 3"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_code_of_the_card_runs_as_it_stands(
    family: str, whole: bool, tiny_text: Path, tiny_llava: Path, tiny_models: Any, tiny_families: Any, tmp_path: Path,
    text_pairs: Callable[..., Path], vision_pairs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = {"text": tiny_text, "LLaVA": tiny_llava}.get(family)
    model = model or tiny_families.save(tiny_models, tmp_path / "model", family)
    pairs = text_pairs(tmp_path / "pairs.jsonl", 4) if family == "text" else vision_pairs(tmp_path, 4)
    recipe: dict[str, Any] = {
        "model": {"name": str(model)},
        "lora": None if whole else {"rank": 3, "alpha": 6},
        "data": {"train": str(pairs), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "max_steps": 1, "pairs_per_step": 2},
        "track": [],
    }
    result = train_dpo(config_from_dict(recipe))
    code = (result.adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    tiny_models.draw_image(result.folder / "picture.png", seed=1).rename(result.folder / "picture.jpg")
    monkeypatch.chdir(result.folder)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n")
