"""What is recorded of a step: its parts add up, its tokens are counted, its most and least moved pairs are the true ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttrain.train.anatomy import EXTREMES, LogRatios, StepClock, most_and_least


class _Event:
    """torch.cuda.Event's interface on a device that is 40 ms behind the host with every piece of work."""

    timeline_ms = 0.0
    waited: list[float] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.timeline_ms += 40
        self.at_ms = _Event.timeline_ms

    def elapsed_time(self, later: _Event) -> float:
        return later.at_ms - self.at_ms

    def synchronize(self) -> None:
        _Event.waited.append(self.at_ms)


def test_on_a_gpu_parts_are_the_devices_and_only_reading_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    clock = StepClock(torch.device("cuda"))
    clock.start()
    for part in ("data", "forward", "backward", "forward", "backward", "other", "update"):
        clock.mark(part)
    assert _Event.waited == []
    read = clock.read()
    assert read == pytest.approx(
        {"step": 0.28, "data": 0.04, "forward": 0.08, "backward": 0.08, "update": 0.04}
    )
    assert _Event.waited == [_Event.timeline_ms]


def test_on_a_cpu_parts_are_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 10.5, 12.5, 13.0, 14.0])
    monkeypatch.setattr("fasttrain.train.anatomy.time.perf_counter", lambda: next(ticks))
    clock = StepClock(torch.device("cpu"))
    clock.mark("update")
    assert clock.read() == {}
    clock.start()
    for part in ("data", "forward", "other", "update"):
        clock.mark(part)
    assert clock.read() == {"step": 4.0, "data": 0.5, "forward": 2.0, "backward": 0.0, "update": 1.0}


class _Data:
    """Two groups; group 5 stands behind group 9 in the file."""

    def pairs(self, group: int) -> np.ndarray:
        return {5: np.array([[0, 1], [0, 2]]), 9: np.array([[1, 0]])}[group]

    def first_row(self, group: int) -> int:
        return {5: 70, 9: 3}[group]


def test_a_pair_is_named_by_its_prompts_row_with_the_change_of_each_answer() -> None:
    ratios = LogRatios()
    # two packs: answers of 2 + 1 + 2 tokens, and of 1 + 1
    ratios.add(
        [(5, 0, 1), (5, 0, 2)], torch.tensor([1.0, 2, 3, 4, 5]), torch.zeros(5), torch.tensor([2, 1, 2]),
        torch.tensor([[0, 1], [0, 2]]),
    )  # fmt: skip
    ratios.add(
        [(9, 1, 0)], torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 0.0]), torch.tensor([1, 1]), torch.tensor([[1, 0]])
    )  # fmt: skip
    assert ratios.extremes(_Data()) == [[3, 0, 0.5, -2.0], [70, 0, 3.0, 3.0], [70, 1, 3.0, 9.0]]  # type: ignore[arg-type]


def test_the_extremes_of_parts_hold_the_extremes_of_the_whole() -> None:
    random = np.random.default_rng(0)
    pairs = [[row, 0, *random.normal(size=2)] for row in range(101)]
    parts = [pairs[start : start + 17] for start in range(0, 101, 17)]
    merged = most_and_least([pair for part in parts for pair in most_and_least(part)])
    margins = sorted((pair[2] - pair[3] for pair in pairs), reverse=True)
    assert [p[2] - p[3] for p in merged] == margins[:EXTREMES] + margins[-EXTREMES:]


def _train(model: Path, pairs: Path, output: Path, **settings: Any) -> list[list[dict[str, Any]]]:
    """Metrics and pair changes of three steps."""
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    raw = {
        "model": {"name": str(model)}, "lora": {"rank": 4, "alpha": 8}, "data": {"train": str(pairs), "workers": 0},
        "train": {
            "output": str(output), "max_steps": 3, "pairs_per_step": 12, "learning_rate": 2e-2, "warmup_ratio": 0.0,
            "schedule": "constant", **settings,
        },
        "track": [],
    }  # fmt: skip
    train_dpo(config_from_dict(raw))
    return [
        [json.loads(line) for line in (output / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "pair_changes.jsonl")
    ]


def test_a_steps_record_adds_up_and_split_groups_move_alike(
    tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = vision_pairs(tmp_path, 12)
    metrics, changes = _train(tiny_llava, pairs, tmp_path / "whole")
    split_metrics, split_changes = _train(tiny_llava, pairs, tmp_path / "split", tokens_per_pack=60)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    images = {json.dumps([row["prompt"], row.get("images")]): len(row.get("images") or []) for row in rows}
    for line in (*metrics, *split_metrics):
        assert line["tokens_images"] + line["tokens_prompts"] + line["tokens_answers"] == line["tokens"]
        parts = line["data_s"] + line["forward_s"] + line["backward_s"] + line["update_s"]
        assert 0.8 * line["step_s"] < parts <= line["step_s"] or line["step"] == 1  # its check has no name
    assert {line["tokens_images"] for line in metrics} == {16 * sum(images.values())}
    assert split_metrics[0]["tokens_images"] > metrics[0]["tokens_images"]  # prompts again, with their images
    ours = [line["pairs"] for line in changes]
    assert [len(found) for found in ours] == [8, 8, 8] and changes[2]["epoch"] == 3
    assert all(abs(value) < 1e-4 for _, _, *values in ours[0] for value in values)
    for found, again in zip(ours[1:], [line["pairs"] for line in split_changes[1:]]):
        margins = [chosen - rejected for _, _, chosen, rejected in found]
        assert margins == sorted(margins, reverse=True) and margins[0] > 0.05
        assert [pair[:2] for pair in found] == [pair[:2] for pair in again]
        assert np.allclose(found, again, atol=2e-4)
