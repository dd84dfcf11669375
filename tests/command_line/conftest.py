"""The command run in the tests' process, in a working folder with a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttrain import cli


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def fasttrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs the command in this process."""

    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fasttrain", *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return Answer(code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_pairs: Any, tiny_text: Path) -> Path:
    """A working folder with a recipe for the text model and its pairs."""
    monkeypatch.chdir(tmp_path)
    text_pairs(tmp_path / "pairs.jsonl", 12)
    return write_recipe(tmp_path / "recipe.yaml", tiny_text, "pairs.jsonl")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vision_pairs: Any, tiny_llava: Path) -> Path:
    """A working folder with a recipe for the LLaVA and pairs with images."""
    monkeypatch.chdir(tmp_path)
    vision_pairs(tmp_path, 6, images=(1,))
    return write_recipe(tmp_path / "recipe.yaml", tiny_llava, "pairs.jsonl")


def write_recipe(path: Path, model: Path, pairs: str) -> Path:
    recipe = {
        "model": {"name": str(model)},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": pairs, "workers": 0},
        "train": {"output": "run", "pairs_per_step": 4, "epochs": 1, "tokens_per_pack": 2000},
        "track": [],
    }
    path.write_text(yaml.safe_dump(recipe))
    return path
