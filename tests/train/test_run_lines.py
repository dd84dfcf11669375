"""metrics.jsonl and pair_changes.jsonl on resume: what a kill cut short is left out, other damage is told and nothing lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttrain.errors import UserError
from fasttrain.report.runs import read_run
from fasttrain.run_lines import read_steps
from fasttrain.train.metrics import MetricsFile

LINES = [json.dumps({"step": step, "loss": 0.5}).encode() for step in range(1, 8)]
DAMAGE = [
    b'{"step": 3, "lo',
    b'{"step": 3, "\xff": 1}',
    b"{}",
    b'{"step": "3"}',
    b"null",
    b"",
    b"[" * 100_000,
]


def written(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("broken", DAMAGE)
def test_a_damaged_line_is_named_and_the_file_left_as_it_is(broken: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", *LINES[:2], broken, *LINES[3:])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl line 3: ") as told:
        MetricsFile(path, keep_through=5)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(UserError) as reported:
        read_run(tmp_path)
    assert str(reported.value) == str(told.value)


@pytest.mark.parametrize("cut", [b'{"step": 8, "lo', b'{"step": 8, "\xc3', b"\0\0\0"])
def test_a_last_line_that_a_kill_cut_short_is_left_out(cut: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", *LINES)
    path.write_bytes(path.read_bytes() + cut)
    file = MetricsFile(path, keep_through=6)
    file.write({"step": 7})
    file.close()
    assert [line["step"] for line in read_steps(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_kept_is_on_disk_before_it_takes_the_files_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = written(tmp_path / "metrics.jsonl", *LINES), []
    original, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append("fsync"), original(handle)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (synced.append("rename"), replace(*paths)))
    MetricsFile(path, keep_through=3).close()
    assert synced[:2] == ["fsync", "rename"]


def test_resume_tells_a_damaged_line_before_anything_is_loaded(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain.config import config_from_dict
    from fasttrain.train import loop

    raw = {
        "model": {"name": str(tiny_text)},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 8)), "workers": 0},
        "train": {
            "output": str(tmp_path / "run"),
            "max_steps": 4,
            "pairs_per_step": 2,
            "checkpoint_every": 2,
        },
        "track": [],
    }
    loop.train_dpo(config_from_dict(raw))
    path = tmp_path / "run" / "pair_changes.jsonl"
    sound = path.read_bytes().splitlines()
    written(path, sound[0], b"{", *sound[2:])
    raw["train"]["max_steps"] = 6
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_job", None)
        with pytest.raises(UserError, match=r"pair_changes\.jsonl line 2: wanted a JSON object, got '\{'"):
            loop.train_dpo(config_from_dict(raw), resume=True)
    written(path, *sound)
    assert [line["step"] for line in loop.train_dpo(config_from_dict(raw), resume=True).metrics] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_resume_tells_of_lines_that_are_gone(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file emptied, another deleted, and a whole one of a run that logs every second step."""
    from fasttrain.config import config_from_dict
    from fasttrain.train import loop

    raw = {
        "model": {"name": str(tiny_text)},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 8)), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "max_steps": 3, "pairs_per_step": 2, "checkpoint_every": 3,
                  "log_every": 2},
        "track": [],
    }  # fmt: skip
    loop.train_dpo(config_from_dict(raw))
    written(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run" / "pair_changes.jsonl").unlink()
    raw["train"] |= {"max_steps": 6, "log_every": 3}
    capsys.readouterr()
    assert [line["step"] for line in loop.train_dpo(config_from_dict(raw), resume=True).metrics] == [6]
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.split("run/")[1].split(";")[0] for line in told] == [
        "metrics.jsonl: 0 of the 2 lines up to the checkpoint are there",
        "pair_changes.jsonl: 0 of the 2 lines up to the checkpoint are there",
    ]
    raw["train"] |= {"max_steps": 9}
    loop.train_dpo(config_from_dict(raw), resume=True)
    assert "warning" not in capsys.readouterr().err
