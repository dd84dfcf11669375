"""When one rank of a run fails, all end, and one message names the rank and the cause; the last checkpoint goes on."""

from __future__ import annotations

import json
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.errors import UserError
from fasttrain.model.policy import Policy

pytestmark = pytest.mark.forks
KILLED = -signal.SIGKILL


@pytest.fixture
def recipe(tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path) -> Path:
    """21 pairs, three steps an epoch, a checkpoint after every second step."""
    text_pairs(tmp_path / "pairs.jsonl", 21)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"name": str(tiny_text)},
                "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
                "data": {"train": str(tmp_path / "pairs.jsonl"), "workers": 0},
                "train": {"output": str(tmp_path / "run"), "epochs": 3, "pairs_per_step": 8, "learning_rate": 1e-3,
                          "tokens_per_pack": 150, "checkpoint_every": 2},
                "track": [],
            }
        )
    )  # fmt: skip
    return path


def strike(rank: int, after: int, blow: Callable[[], None]) -> Callable[[], None]:
    """Makes `blow` hit a rank at its `after`-th pass with a gradient: in the third step, after the first checkpoint."""

    def install() -> None:
        if os.environ["RANK"] != str(rank):
            return
        forward, passes = Policy.forward, 0

        def struck(self: Policy, *args: Any, **wants: bool) -> Any:
            nonlocal passes
            passes += torch.is_grad_enabled()
            if passes == after:
                blow()
            return forward(self, *args, **wants)

        Policy.forward = struck  # type: ignore[method-assign]

    return install


def raising(error: BaseException) -> Callable[[], None]:
    def blow() -> None:
        raise error

    return blow


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def numbers(folder: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["rewards/margins"]) for line in lines]


ENGINES = [
    pytest.param([], id="plain"),
    pytest.param(["-s", "distributed.zero_stage=2"], id="ZeRO-2", marks=pytest.mark.slow),
    pytest.param(["-s", "distributed.zero_stage=3"], id="ZeRO-3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_rank_stops_the_run_which_resumes_to_the_same_numbers(
    recipe: Path, run_ranks: Any, command: Any, tmp_path: Path, engine: list[str]
) -> None:
    undisturbed = run_ranks(command("dpo", "-c", recipe, *engine, "-s", f"train.output={tmp_path / 'whole'}"))
    assert undisturbed.codes == [0, 0], undisturbed.stderr
    ended = run_ranks(command("dpo", "-c", recipe, *engine, before=strike(1, 12, killed)))
    assert ended.codes == [1, KILLED], ended.stderr
    (message,) = ended.messages
    assert message.startswith("fasttrain: error: rank 1 (") and "killed (SIGKILL" in message
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] < "step-000008"
    again = run_ranks(command("dpo", "-c", recipe, *engine, "--resume"))
    assert again.codes == [0, 0], again.stderr
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_death_of_the_first_rank_is_told_by_the_second(recipe: Path, run_ranks: Any, command: Any) -> None:
    ended = run_ranks(command("dpo", "-c", recipe, before=strike(0, 9, killed)), size=3)
    assert ended.codes == [KILLED, 1, 1], ended.stderr
    (message,) = ended.messages
    assert message.startswith("fasttrain: error: rank 0 (") and "SIGKILL" in message


@pytest.mark.parametrize("slow", [1, 2])
def test_one_message_however_late_a_rank_drops_its_connection(
    recipe: Path, run_ranks: Any, command: Any, slow: int
) -> None:
    """The main thread's collective fails while the watching thread is still dropping the dead rank."""
    kill = strike(0, 9, killed)

    def install() -> None:
        kill()
        if os.environ["RANK"] == str(slow):
            unregister = selectors.DefaultSelector.unregister

            def late(self: selectors.BaseSelector, link: Any) -> Any:
                time.sleep(1)
                return unregister(self, link)

            selectors.DefaultSelector.unregister = late  # type: ignore[method-assign]

    ended = run_ranks(command("dpo", "-c", recipe, before=install), size=3)
    assert ended.codes == [KILLED, 1, 1], ended.stderr
    (message,) = ended.messages
    assert message.startswith("fasttrain: error: rank 0 (") and "SIGKILL" in message


@pytest.mark.parametrize("engine", [ENGINES[0], ENGINES[2]])
@pytest.mark.parametrize(
    ("rank", "error", "code", "words"),
    [
        (1, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), 1, "out of memory: CUDA out of memory. Tried 2 GiB; lower"),
        (0, UserError("pairs.jsonl, line 3: images: wanted an image, got rubbish"), 2, "pairs.jsonl, line 3: images"),
    ],
)  # fmt: skip
def test_failing_rank_is_named_once_with_its_cause(
    recipe: Path, run_ranks: Any, command: Any, engine: list[str], rank: int, error: Exception, code: int, words: str
) -> None:  # fmt: skip
    ended = run_ranks(command("dpo", "-c", recipe, *engine, before=strike(rank, 9, raising(error))))
    assert ended.codes == [code, code], ended.stderr
    (message,) = ended.messages
    assert message.startswith(f"fasttrain: error: rank {rank} (") and words in message
    assert "Traceback" not in ended.stderr


def test_an_interrupt_of_one_rank_is_told_once_with_how_to_go_on(
    recipe: Path, run_ranks: Any, command: Any
) -> None:
    ended = run_ranks(command("dpo", "-c", recipe, before=strike(1, 9, raising(KeyboardInterrupt()))))
    assert ended.codes == [130, 130], ended.stderr
    (message,) = ended.messages
    assert message.count("interrupted") == message.count("--resume") == 1, message


@pytest.mark.parametrize(
    ("ranks", "place"), [("01", "build_job"), ("1", "fill_references"), ("0", "write_final")]
)
def test_sigterm_outside_of_the_steps_is_told_once_with_how_to_go_on(
    recipe: Path, run_ranks: Any, command: Any, ranks: str, place: str
) -> None:
    def install() -> None:
        from fasttrain.train import loop

        function = getattr(loop, place)

        def told_to_end(*given: Any) -> Any:
            if os.environ["RANK"] in ranks:
                signal.raise_signal(signal.SIGTERM)
            return function(*given)

        setattr(loop, place, told_to_end)

    ended = run_ranks(command("dpo", "-c", recipe, "-s", "train.max_steps=1", before=install))
    assert ended.codes == [143, 143], ended.stderr
    (message,) = ended.messages
    assert message.count("terminated") == message.count("--resume") == 1, message
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("which", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_rank_that_waits_for_others_says_so_and_hears_signals(
    recipe: Path, run_ranks: Any, command: Any, monkeypatch: pytest.MonkeyPatch, which: signal.Signals, code: int, word: str
) -> None:  # fmt: skip
    from fasttrain import ranks

    monkeypatch.setattr(ranks, "_SPEAK_S", 0.1)

    def alone() -> None:
        signal.alarm(20)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["WORLD_SIZE"] = "2"
        meet = torch.distributed.init_process_group

        def told_to_end(*given: Any, **named: Any) -> None:
            threading.Timer(0.5, os.kill, [os.getpid(), which]).start()
            meet(*given, **named)

        torch.distributed.init_process_group = told_to_end  # type: ignore[assignment]

    ended = run_ranks(command("dpo", "-c", recipe, before=alone), size=1)
    assert ended.codes == [code], ended.stderr
    assert "rank 0 waits at 127.0.0.1:" in ended.stderr
    assert ended.messages == [f"fasttrain: {word}; what is done is kept, go on with --resume"]


def test_bug_shows_the_traceback_of_the_rank_that_has_it(recipe: Path, run_ranks: Any, command: Any) -> None:
    ended = run_ranks(command("dpo", "-c", recipe, before=strike(1, 9, raising(KeyError("lost")))))
    assert ended.codes == [1, 1], ended.stderr
    assert ended.stderr.count("Traceback (most recent call last)") == 1
    assert "in struck" in ended.stderr and "rank 1" in ended.messages[0] and len(ended.messages) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.typo=1", "train.typo"),
        ("data.max_length=3", "line 1"),
        ("data.train=absent.jsonl", "absent.jsonl"),
    ],
)
def test_mistake_that_every_rank_finds_is_told_once(
    recipe: Path, run_ranks: Any, command: Any, override: str, words: str
) -> None:
    ended = run_ranks(command("dpo", "-c", recipe, "-s", override))
    assert ended.codes == [2, 2], ended.stderr
    (message,) = ended.messages
    assert words in message and "rank 0" not in message and "rank 1" not in message
