"""What every rank plans from is the same on all of them, and what one finds wrong is told before the others wait in a pass."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError

pytestmark = pytest.mark.forks
LITTLE = 4_000_000  # bytes free at which packs of the tiny model depend on them


@pytest.fixture
def write_recipe(tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Recipes over 21 pairs, or so many; `auto` decides about packs."""

    def write(name: str = "recipe", count: int = 21, **train: Any) -> Path:
        pairs = text_pairs(tmp_path / f"pairs{count}.jsonl", count)
        raw = {
            "model": {"name": str(tiny_text)},
            "lora": {"rank": 4},
            "data": {"train": str(pairs), "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": 3, "pairs_per_step": 8, **train},
            "track": [],
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(raw))
        return path

    return write


def with_free(*sizes: int) -> Callable[[], None]:
    """So many bytes are free on each rank's device."""

    def install() -> None:
        from fasttrain.train import job

        size = sizes[int(os.environ.get("RANK", "0"))]
        job.free_memory = lambda device: size  # type: ignore[assignment]

    return install


def on_rank_1(change: Callable[[], None]) -> Callable[[], None]:
    return lambda: change() if os.environ["RANK"] == "1" else None


def settled(folder: Path) -> tuple[bool, int]:
    facts = json.loads((folder / "environment.json").read_text())
    return facts["gradient_checkpointing"], facts["tokens_per_pack"]


def test_ranks_settle_on_what_the_fullest_device_holds(
    write_recipe: Callable[..., Path], run_ranks: Any, command: Any, tmp_path: Path
) -> None:
    recipe = write_recipe()
    alone = {}
    for free in (LITTLE, 2 * LITTLE):
        words = ("dpo", "-c", recipe, "-s", f"train.output={tmp_path / str(free)}")
        assert run_ranks(command(*words, before=with_free(free)), size=1).codes == [0]
        alone[free] = settled(tmp_path / str(free))
    assert alone[LITTLE] != alone[2 * LITTLE], "this memory decides nothing"
    ended = run_ranks(command("dpo", "-c", recipe, before=with_free(2 * LITTLE, LITTLE)))
    assert ended.codes == [0, 0], ended.stderr
    assert settled(tmp_path / "run") == alone[LITTLE]


def test_a_resumed_run_keeps_its_packs_while_they_fit(
    write_recipe: Callable[..., Path], run_ranks: Any, command: Any, tmp_path: Path
) -> None:
    recipe = write_recipe()
    found = []
    for steps, free in ((1, 2 * LITTLE), (2, 100 * LITTLE), (3, LITTLE)):
        words = ("dpo", "-c", recipe, "-s", f"train.max_steps={steps}", *(("--resume",) if steps > 1 else ()))
        ended = run_ranks(command(*words, before=with_free(free)), size=1)
        assert ended.codes == [0], ended.stderr
        found.append(settled(tmp_path / "run"))
    assert found[1] == found[0] and found[2] != found[0]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"count": 17}, "data.train: wanted the same pairs and images on all ranks, got 21 pairs in"),
        ({"learning_rate": 0.5}, "-c: wanted one recipe for all ranks, got another on rank 1"),
    ],
)
def test_ranks_with_other_pairs_or_another_recipe_are_refused(
    write_recipe: Callable[..., Path], run_ranks: Any, other: dict[str, Any], words: str
) -> None:
    recipes = [write_recipe(), write_recipe("other", **other)]

    def body() -> None:
        from fasttrain.cli import main

        sys.argv = ["fasttrain", "dpo", "-c", str(recipes[int(os.environ["RANK"])])]
        main()

    ended = run_ranks(body)
    assert ended.codes == [2, 2], ended.stderr
    (message,) = ended.messages
    assert words in message


def test_ranks_that_see_other_checkpoints_do_not_go_on(
    write_recipe: Callable[..., Path], run_ranks: Any, command: Any
) -> None:
    recipe = write_recipe()
    assert run_ranks(command("dpo", "-c", recipe, "-s", "train.max_steps=2")).codes == [0, 0]

    def blind() -> None:
        from fasttrain.train import loop

        loop.latest_checkpoint = lambda folder: None  # type: ignore[assignment]

    ended = run_ranks(command("dpo", "-c", recipe, "--resume", before=on_rank_1(blind)))
    assert ended.codes == [2, 2], ended.stderr
    (message,) = ended.messages
    assert "--resume: wanted all ranks to see the same checkpoints" in message
    assert "got step-000002, none as their last" in message


def test_mfu_is_of_all_devices(
    write_recipe: Callable[..., Path], run_ranks: Any, command: Any, tmp_path: Path
) -> None:
    def install() -> None:
        from fasttrain.train import loop

        loop.peak_rate = lambda device, dtype: (1e9, "a test")  # type: ignore[assignment]
        loop.peak_memory = lambda device: 100 + int(os.environ["RANK"])  # type: ignore[assignment]

    ended = run_ranks(command("dpo", "-c", write_recipe(), before=install))
    assert ended.codes == [0, 0], ended.stderr
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["mfu"] == pytest.approx(line["tflops"] * 1e12 / 2e9)
    assert line["peak_bytes"] == 101  # the largest
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (facts["mfu_is_against_flops"], facts["mfu_peak_source"]) == (2e9, "2 x a test")


@pytest.mark.parametrize(
    "stage", ["null", pytest.param("3", marks=pytest.mark.slow)], ids=["plain", "ZeRO-3"]
)
def test_a_broken_image_in_the_fill_is_one_line(
    stage: str, tiny_llava: Path, vision_pairs: Callable[..., Path], run_ranks: Any, command: Any, tmp_path: Path
) -> None:  # fmt: skip
    """Found by one rank, which leaves the others no pass to wait in."""
    pairs = vision_pairs(tmp_path / "images", 11)
    image = max((tmp_path / "images").rglob("*.png"), key=lambda path: path.stat().st_size)
    image.write_bytes(image.read_bytes()[:-40])  # its header can be read
    recipe = tmp_path / "recipe.yaml"
    raw = {
        "model": {"name": str(tiny_llava)},
        "data": {"train": str(pairs), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "max_steps": 20, "tokens_per_pack": 100},
        "distributed": {"zero_stage": None if stage == "null" else int(stage)},
    }
    recipe.write_text(json.dumps(raw))
    ended = run_ranks(command("reference", "-c", recipe))
    assert ended.codes == [2, 2], ended.stderr
    (message,) = ended.messages
    assert "images: wanted an image, got" in message and image.name in message


@pytest.mark.slow
def test_a_rank_that_fails_to_load_its_part_of_a_zero_3_model_stops_all(
    write_recipe: Callable[..., Path], run_ranks: Any, command: Any
) -> None:
    def install() -> None:
        from fasttrain.train import job

        def fail(*_: Any, **__: Any) -> Any:
            raise UserError("model.name: wanted every weight, got none")

        job.load_model = fail  # type: ignore[assignment]

    words = ("dpo", "-c", write_recipe(), "-s", "distributed.zero_stage=3")
    ended = run_ranks(command(*words, before=on_rank_1(install)))
    assert ended.codes == [2, 2], ended.stderr
    (message,) = ended.messages
    assert "rank 1" in message and "model.name: wanted every weight, got none" in message


@pytest.mark.slow
def test_a_dry_run_under_zero_3_checks_sharing_too(
    write_recipe: Callable[..., Path], run_ranks: Any, command: Any
) -> None:
    def install() -> None:
        from fasttrain.train import first_step

        first_step.VERIFIED = set()

    words = ("dpo", "-c", write_recipe(), "--dry-run", "-s", "distributed.zero_stage=3")
    ended = run_ranks(command(*words, before=install), size=1)
    assert ended.codes == [0], ended.stderr
    assert "warning" not in ended.stderr
