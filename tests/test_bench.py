"""The contenders of bench/step.py run, and compute one loss: what the ladder takes out changes the way, not the result."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    for prompt, chosen, rejected in (
        ("what does the chart show?", "a line that rises", "nothing"),
        ("how many bars?", "seven", "there are six of them"),
        ("how many bars?", "seven", "five"),
    )
]


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    # behind everything else: bench has a script called kernels
    monkeypatch.setattr(sys, "path", [*sys.path, str(repository / "bench")])
    return importlib.import_module


def test_every_way_of_taking_a_step_has_the_same_loss(
    bench: Callable[[str], Any], tiny_text: Path, fresh_cache: Path, tmp_path: Path
) -> None:  # fmt: skip
    cases, contenders = bench("step_cases"), bench("step_contenders")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    model = cases.write_model(tiny_text, tmp_path / "model")
    adapter = cases.write_adapter(model, tmp_path, rank=4)
    losses: dict[str, list[float]] = {}
    for name in ("fasttrain", "plain", *contenders.LADDER[3:-1]):
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        case = cases.Case("tiny", "text", [[9, 9], [9, 9, 9]])  # only their number is read
        contender = contenders.make(name, contenders.Files(case, model, pairs, adapter, 4, folder))
        losses[name] = [contender.step(), contender.step()]
    assert losses["fasttrain"][0] != losses["fasttrain"][1]
    for name, found in losses.items():
        assert found == pytest.approx(losses["fasttrain"], rel=1e-5), name
