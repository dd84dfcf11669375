"""A fill that is killed goes on with another number of ranks: nothing that is stored is computed again, and the bits are the same."""

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
