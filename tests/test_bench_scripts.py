"""The scripts under bench/ that run in seconds on tiny inputs do run, and say what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def script(repository: Path, fresh_cache: Path, tmp_path: Path) -> Callable[..., str]:
    """What a script prints; it must end well. It runs where the files that it writes by default leave nothing behind."""

    def run(name: str, *arguments: object) -> str:
        command = [sys.executable, str(repository / "bench" / f"{name}.py"), *map(str, arguments)]
        environment = os.environ | {"FASTTRAIN_CACHE": str(fresh_cache), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_packing_deals_out_the_groups_it_drew(script: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "packing.md"
    script("packing", "--ranks", 4, "--groups", 500, "--pairs-per-step", 32, "--out", out)
    (row,) = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("| 32 |")]
    _, _, groups_a_rank, packs_a_rank, *_ = (field.strip() for field in row.split("|"))
    assert 3 < float(groups_a_rank) < 6  # 2 to 4 answers a group are 1 to 3 pairs
    assert 1 <= float(packs_a_rank) < 2


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("attention", "--heads smollm2 --prompts 32 --completions 2 --threads 1 --repeats 1", "| unshared |"),
        ("kernels", "--shapes smollm2 --rows 4 --threads 1 --repeats 1 --no-compile", "| fasttrain |"),
        ("annotate_throughput", "rate --prompts 5 --delay 0.01 --rpm 6000", "5 calls"),
        ("annotate_throughput", "memory --prompts 20", "20 prompts"),
    ],
)  # fmt: skip
def test_what_needs_no_model_runs(script: Callable[..., str], name: str, arguments: str, said: str) -> None:
    assert said in script(name, *arguments.split())


def test_loading_counts_every_weight_once(
    script: Callable[..., str], tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    raw = {
        "model": {"name": str(tiny_text)},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 3))},
        "train": {"output": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw), encoding="utf-8")
    assert "elements whole" in script("loading", "-c", tmp_path / "recipe.yaml")


def test_answers_with_shared_prompts_are_those_of_generate(
    script: Callable[..., str], tiny_llava: Path, tmp_path: Path
) -> None:
    from PIL import Image

    for number in range(2):
        Image.new("RGB", (40, 30), (90 * number, 9, 200)).save(tmp_path / f"{number}.jpg")
    asked = ("--images", tmp_path, "--count", 2, "--questions", 2, "--tokens", 3, "--turns", 1)
    assert "same texts: 4 of 4" in script("answers", tiny_llava, *asked)


@pytest.mark.slow
def test_start_up_over_rows_is_measured_and_drawn(
    script: Callable[..., str], tiny_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "smollm2").symlink_to(tiny_text)
    out = tmp_path / "scaling.csv"
    script("scaling", "rows", "--most", 1000, "--models", tmp_path, "--threads", 1, "--out", out)
    assert "rows" in out.read_text(encoding="utf-8")
