"""A run over a large pair file, whose groups are tokenized as steps ask for them, is the run it would be otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TIMINGS = {"tflops", "mfu", "peak_bytes"}  # and what ends in _s: seconds, and rates


def numbers(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMINGS and not name.endswith("_s")}
        for line in lines
    ]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on every pair file counts as large, and nothing may tokenize all of it."""

    def switch() -> None:
        from fasttrain.data import prepare, prepared

        monkeypatch.setattr(prepare, "LAZY_FROM", 1)
        monkeypatch.setattr(
            prepared.PreparedData, "complete", lambda *given: pytest.fail("all groups were tokenized")
        )

    return switch


def recipe(model: Path, pairs: Path, output: Path, **train: Any) -> Any:
    from fasttrain.config import config_from_dict

    train = {"tokens_per_pack": 400, "gradient_checkpointing": False, "learning_rate": 1e-3, **train}
    raw = {
        "model": {"name": str(model)},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": str(pairs),
            "workers": train.pop("workers", 0),
            "on_bad_row": "skip",
            "overflow": "drop",
        },
        "train": {"output": str(output), "pairs_per_step": 2, "seed": 3, **train},
        "track": [],
    }
    return config_from_dict(raw)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["text", "llava"])
def test_a_short_run_is_the_same_bit_for_bit(
    kind: str, workers: int, late: Any, tiny_text: Path, tiny_llava: Path, text_pairs: Any, vision_pairs: Any, tmp_path: Path,
    fresh_cache: Path,
) -> None:  # fmt: skip
    from fasttrain import train_dpo

    model = tiny_text if kind == "text" else tiny_llava
    if kind == "text":
        pairs = text_pairs(tmp_path / "pairs.jsonl", 90)
    else:
        pairs = vision_pairs(tmp_path / "data", 90)
    with pairs.open("a") as file:
        file.write('{"prompt": "q", "chosen": " ", "rejected": "b"}\nnot json\n')
    train_dpo(recipe(model, pairs, tmp_path / "whole", max_steps=4))
    late()
    train_dpo(recipe(model, pairs, tmp_path / "late", max_steps=4, workers=workers))
    assert numbers(tmp_path / "late") == numbers(tmp_path / "whole")
    for name in ("skipped.jsonl", "final/adapter_model.safetensors"):
        assert (tmp_path / "late" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    facts = [json.loads((tmp_path / name / "environment.json").read_text()) for name in ("late", "whole")]
    assert facts[0]["data"] == facts[1]["data"] and facts[0]["data"]["train"]["pairs"] == 90


def test_whole_epochs_of_supervised_tuning_never_tokenize_all_at_once(
    late: Any, tiny_text: Path, text_pairs: Any, tmp_path: Path, fresh_cache: Path
) -> None:
    from fasttrain.train.loop import train_sft

    pairs = text_pairs(tmp_path / "pairs.jsonl", 24)
    train_sft(recipe(tiny_text, pairs, tmp_path / "whole", epochs=2))
    late()
    train_sft(recipe(tiny_text, pairs, tmp_path / "late", epochs=2, workers=1))
    assert numbers(tmp_path / "late") == numbers(tmp_path / "whole")


def test_a_resumed_run_is_the_same_bit_for_bit(
    late: Any, tiny_text: Path, text_pairs: Any, tmp_path: Path, fresh_cache: Path
) -> None:
    from fasttrain import train_dpo

    pairs = text_pairs(tmp_path / "pairs.jsonl", 90)
    train_dpo(recipe(tiny_text, pairs, tmp_path / "whole", max_steps=4))
    late()
    train_dpo(recipe(tiny_text, pairs, tmp_path / "late", max_steps=2))
    train_dpo(recipe(tiny_text, pairs, tmp_path / "late", max_steps=4, workers=1), resume=True)
    found, truth = numbers(tmp_path / "late"), numbers(tmp_path / "whole")
    for line in (*found, *truth):
        line.pop("learning_rate")  # the schedule of two steps ends sooner
    assert [line["tokens"] for line in found] == [line["tokens"] for line in truth]
    assert found[0] == truth[0]


def test_a_run_over_all_pairs_tokenizes_all_before_their_references(
    tiny_text: Path, text_pairs: Any, tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain import train_dpo
    from fasttrain.data import prepare

    pairs = text_pairs(tmp_path / "pairs.jsonl", 24)
    train_dpo(recipe(tiny_text, pairs, tmp_path / "whole", epochs=1))
    monkeypatch.setattr(prepare, "LAZY_FROM", 1)
    train_dpo(recipe(tiny_text, pairs, tmp_path / "late", epochs=1, workers=1))
    assert numbers(tmp_path / "late") == numbers(tmp_path / "whole")
