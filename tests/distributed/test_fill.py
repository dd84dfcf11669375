"""Filling by several ranks: a killed fill goes on with another number of them, to the same bits, and broken images are left out."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.model.policy import Policy

pytestmark = pytest.mark.forks


def stored(root: Path) -> dict[bytes, bytes]:
    """Every key and log-prob in the cache, read without our code."""
    (path,) = (root / "reference").glob("*.sqlite")
    with sqlite3.connect(path) as database:
        return dict(database.execute("SELECT key, logp FROM logps"))


def watched(folder: Path, die: tuple[int, int] | None = None) -> Callable[[], None]:
    """Notes the keys of every pass that is not a repeat; `die` is (rank, pass): killed before it."""

    def install() -> None:
        forward, passes = Policy.forward, 0
        note = (folder / f"{os.environ['RANK']}.txt").open("a")

        def seen(self: Policy, batch: Any, **wants: bool) -> Any:
            nonlocal passes
            passes += 1
            if die == (int(os.environ["RANK"]), passes):
                os.kill(os.getpid(), signal.SIGKILL)
            out = forward(self, batch, **wants)
            note.writelines(f"{key.hex()}\n" for key in ([] if batch.pack.fill else batch.keys))
            note.flush()
            return out

        Policy.forward = seen  # type: ignore[method-assign]

    return install


def computed(folder: Path) -> Counter[bytes]:
    return Counter(bytes.fromhex(line) for path in folder.iterdir() for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    "stage", ["null", pytest.param("3", marks=pytest.mark.slow)], ids=["plain", "ZeRO-3"]
)
def test_a_killed_fill_goes_on_with_another_number_of_ranks(
    stage: str, tiny_llava: Path, vision_pairs: Callable[..., Path], run_ranks: Any, command: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"name": str(tiny_llava)},
                "data": {"train": str(vision_pairs(tmp_path / "images", 31)), "workers": 0},
                "train": {"output": str(tmp_path / "run"), "tokens_per_pack": 150},
                "distributed": {"zero_stage": None if stage == "null" else int(stage)},
            }
        )
    )
    for name in ("first", "then", "once"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "killed"))
    fill = ("reference", "-c", recipe)
    ended = run_ranks(command(*fill, before=watched(tmp_path / "first", die=(1, 4))))
    assert ended.codes == [1, -signal.SIGKILL], ended.stderr
    (message,) = ended.messages
    assert message.endswith("what is done is kept, the same command goes on with it")  # it has no --resume
    before = stored(tmp_path / "killed")

    ended = run_ranks(command(*fill, before=watched(tmp_path / "then")), size=3)
    assert ended.codes == [0, 0, 0], ended.stderr
    after, again = stored(tmp_path / "killed"), computed(tmp_path / "then")
    assert 0 < len(before) < len(after)
    assert set(again) == after.keys() - before.keys() and set(again.values()) == {1}
    assert computed(tmp_path / "first").keys() >= before.keys()

    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "whole"))
    ended = run_ranks(command(*fill, before=watched(tmp_path / "once")), size=1)
    assert ended.codes == [0], ended.stderr
    assert stored(tmp_path / "whole") == after


@pytest.fixture
def skipping(tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path, fresh_cache: Path) -> Path:
    """A recipe that leaves out broken images: one of the five to train on."""
    for name in ("train", "eval"):
        vision_pairs(tmp_path / name, 5, per_prompt=(1,), images=(1,))
    cut(tmp_path / "train" / "images" / "2.png")
    recipe = tmp_path / "recipe.yaml"
    data = {"train": str(tmp_path / "train" / "pairs.jsonl"), "eval": str(tmp_path / "eval" / "pairs.jsonl")}
    raw = {
        "model": {"name": str(tiny_llava)},
        "lora": {"rank": 2},
        "data": {**data, "on_bad_row": "skip", "workers": 0},
        "train": {
            "output": str(tmp_path / "run"),
            "max_steps": 2,
            "pairs_per_step": 4,
            "tokens_per_pack": 300,
        },
        "track": [],
    }
    recipe.write_text(json.dumps(raw))
    return recipe


def cut(image: Path) -> None:
    """Cut a file in its body: its header can still be read."""
    image.write_bytes(image.read_bytes()[:-60])


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_a_broken_image_is_left_out_on_all_ranks_at_every_start(
    method: str, skipping: Path, run_ranks: Any, command: Any, tmp_path: Path
) -> None:
    """At the second start it is all that has no reference: no pack could be made of it."""
    for steps, how in ((1, []), (2, ["--resume"])):
        ended = run_ranks(command(method, "-c", skipping, "-s", f"train.max_steps={steps}", *how))
        assert ended.codes == [0, 0], ended.stderr
        (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
        assert "line 3" in json.loads(line)["where"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_evaluation_without_a_sound_image_is_one_line_before_training(
    skipping: Path, run_ranks: Any, command: Any, tmp_path: Path
) -> None:
    for image in (tmp_path / "eval" / "images").iterdir():
        cut(image)
    ended = run_ranks(command("dpo", "-c", skipping))
    assert ended.codes == [2, 2], ended.stderr
    (message,) = ended.messages
    assert "data.eval: wanted at least one usable pair" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
