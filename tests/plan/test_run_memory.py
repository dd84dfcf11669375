"""What a run settles before its first step reckons with what no setting makes shorter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import train_dpo
from fasttrain.config import config_from_dict
from fasttrain.plan import memory, remembered
from fasttrain.plan.passes import PassSize, count_pass
from fasttrain.plan.run_memory import RunMemory


@dataclass
class Lengths:
    """Tokens of the longest group and sequence; while lazy, `slack` times as many are all that is known."""

    group: int
    sequence: int
    slack: int = 1
    tokenized: int = 0

    @property
    def lazy(self) -> bool:
        return self.slack > 1

    def longest(self) -> tuple[int, int]:
        return self.slack * self.group, self.slack * self.sequence

    def longest_beyond(self, tokens: int) -> int:
        self.tokenized += 1
        return max(tokens, self.group)

    def longest_sequence_beyond(self, tokens: int) -> int:
        self.tokenized += 1
        return max(tokens, self.sequence)


@pytest.fixture
def settle() -> Callable[..., tuple[bool, int]]:
    """Settings of a run on the CPU where so many tokens fit, without checkpointing and with it."""

    def run(lengths: Lengths, plain: int, checkpointed: int, **train: Any) -> tuple[bool, int]:
        data: dict[str, Any] = {"train": "unused"}
        config = config_from_dict({"model": {"name": "unused"}, "lora": {}, "data": data, "train": train})
        absent: Any = None
        memory = RunMemory(config, absent, absent, lengths, torch.device("cpu"), free=0)  # type: ignore[arg-type]
        memory.fits = lambda tokens, on, counted=False: tokens <= (checkpointed if on else plain)  # type: ignore[method-assign]
        return memory.settings()

    return run


@pytest.mark.parametrize("slack", [1, 3])
@pytest.mark.parametrize("train", [{}, {"tokens_per_pack": 600}])
def test_a_sequence_that_does_not_fit_whole_needs_checkpointing(
    train: dict[str, Any], slack: int, settle: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert settle(Lengths(4000, 3001, slack), 3000, 9000, **train)[0] is True
    assert settle(Lengths(4000, 2900, slack), 3000, 9000, **train)[0] is False
    assert not capsys.readouterr().err
    settle(Lengths(9500, 9100, slack), 3000, 9000, **train)
    assert "9,100 tokens" in capsys.readouterr().err


def test_a_recipe_without_checkpointing_is_warned_of_a_sequence_that_needs_it(
    settle: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert settle(Lengths(4000, 3001), 3000, 9000, gradient_checkpointing=False) == (False, 2816)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "3,001 tokens" in told[0] and "train.gradient_checkpointing: true" in told[0]


def test_late_tokens_are_made_only_where_they_decide(settle: Callable[..., Any]) -> None:
    short, forced = Lengths(400, 300, slack=3), Lengths(400, 300, slack=3)
    assert settle(short, 2048, 9000) == (False, 2048)
    assert settle(forced, 100, 9000) == (True, 2048)
    assert short.tokenized == forced.tokenized == 0


@pytest.mark.parametrize(
    ("gradient_checkpointing", "tokens_per_pack"), [("auto", "auto"), (True, "auto"), ("auto", 700)]
)
@pytest.mark.parametrize("group", [900, 5000])
def test_where_all_fits_one_pass_is_counted_and_the_settings_are_those_of_a_narrower_machine(
    gradient_checkpointing: Any, tokens_per_pack: Any, group: int, settle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    train = {"gradient_checkpointing": gradient_checkpointing, "tokens_per_pack": tokens_per_pack}
    ample = settle(Lengths(group, 800), 10**9, 10**9, **train)
    monkeypatch.setattr(RunMemory, "_all_fits", lambda self: None)
    assert ample == settle(Lengths(group, 800), 10**9, 10**9, **train)


def test_a_second_start_takes_the_bytes_that_the_first_counted(
    tiny_text: Path, text_pairs: Callable[..., Path], fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Not of another recipe or other code, nor from a damaged entry, nor where it cannot be kept."""
    counted: list[PassSize] = []

    def count(model: Any, size: PassSize, **how: Any) -> Any:
        counted.append(size)
        return count_pass(model, size, **how)

    monkeypatch.setattr(memory, "count_pass", count)
    pairs = text_pairs(tmp_path / "pairs.jsonl", 8)

    def start(rank: int = 4) -> int:
        """How many passes a start counts."""
        raw = {
            "model": {"name": str(tiny_text)},
            "lora": {"rank": rank, "alpha": 8},
            "data": {"train": str(pairs), "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": 1},
            "track": [],
        }
        counted.clear()
        train_dpo(config_from_dict(raw, []), overwrite=True)
        return len(counted)

    assert (start(), start(), start(rank=8), start()) == (1, 0, 1, 0)
    entries = list((fresh_cache / "memory").iterdir())
    assert len(entries) == 2
    for entry in entries:
        entry.write_text("{")
    assert (start(), start()) == (1, 0)
    monkeypatch.setattr(remembered, "_code", lambda: ["other"])
    assert (start(), start()) == (1, 0)
    shutil.rmtree(fresh_cache / "memory")
    (fresh_cache / "memory").write_text("a file where the folder would be")
    assert (start(), start()) == (1, 1)


def test_the_oldest_predictions_are_forgotten(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "KEPT", 3)
    for number in range(5):
        assert remembered.remembered({"n": number}, lambda number=number: number) == number
    assert len(list((fresh_cache / "memory").iterdir())) == 3
