"""A run goes on only with the pairs, weights and template that it was begun with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from fasttrain.errors import UserError


@pytest.fixture
def run(tiny_text: Path, text_pairs: Any, tmp_path: Path, fresh_cache: Path) -> Callable[..., Any]:
    """Trains to a step with a copy of the model; the run folder holds a checkpoint then."""
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    shutil.copytree(tiny_text, tmp_path / "model")
    pairs = text_pairs(tmp_path / "pairs.jsonl", 12)
    shutil.copy(pairs, tmp_path / "eval.jsonl")

    def train(steps: int, **options: Any) -> Any:
        raw = {
            "model": {"name": str(tmp_path / "model")},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(pairs), "eval": str(tmp_path / "eval.jsonl"), "workers": 0},
            "train": {"output": str(tmp_path / "run"), "max_steps": steps, "pairs_per_step": 2, "tokens_per_pack": 400,
                      "gradient_checkpointing": False},
            "track": [],
        }  # fmt: skip
        return train_dpo(config_from_dict(raw), **options)

    train(1)
    return train


def _other_row(folder: Path) -> str:
    rows = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "pairs.jsonl").write_text("\n".join(rows[::-1]) + "\n")
    return f"data.train {folder / 'pairs.jsonl'}"


def _other_eval(folder: Path) -> str:
    rows = (folder / "eval.jsonl").read_text().splitlines()
    (folder / "eval.jsonl").write_text("\n".join(rows[1:]) + "\n")
    return f"data.eval {folder / 'eval.jsonl'}"


def _other_weights(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model" / "model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in weights.items()},
        folder / "model" / "model.safetensors",
        {"format": "pt"},
    )
    return "the weights of model.name"


def _other_template(folder: Path) -> str:
    path = folder / "model" / "chat_template.jinja"
    path.write_text("Hello. " + path.read_text())
    return "the tokenizer or chat template of model.name"


def _other_bos(folder: Path) -> str:
    """What the template writes for {{ bos_token }}: the tokenizer's own file does not say it."""
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<unk>"}))
    return "the special tokens of model.name"


@pytest.mark.parametrize("change", [_other_row, _other_eval, _other_weights, _other_template, _other_bos])
def test_changed_inputs_are_refused_by_name(change: Callable[[Path], str], run: Any, tmp_path: Path) -> None:
    name = change(tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as refused:
        run(2, resume=True)
    told = str(refused.value)
    assert told.startswith("--resume: changed since ") and f" was written: {name}" in told
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    run(2, overwrite=True)


@pytest.fixture
def set_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[date], None]:
    """Makes it another day, for us and for transformers."""
    from transformers.utils import chat_template_utils

    from fasttrain.train import run_folder

    def to(day: date) -> None:
        class Day(date):
            @classmethod
            def today(cls) -> date:
                return day

        class Now(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime(day.year, day.month, day.day, 12)

        monkeypatch.setattr(run_folder, "date", Day)
        monkeypatch.setattr(chat_template_utils, "datetime", Now)

    return to


def test_a_run_resumed_on_another_day_goes_on_with_the_date_it_began_with(
    run: Any, tmp_path: Path, set_day: Callable[[date], None]
) -> None:
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ 'Today Date: ' + strftime_now('%d %b %Y') }}" + template.read_text())
    set_day(date(2026, 11, 26))
    whole = [(line["loss"], line["logps/chosen"]) for line in run(3, overwrite=True).metrics]
    run(1, overwrite=True)
    set_day(date(2026, 11, 28))
    assert [(line["loss"], line["logps/chosen"]) for line in run(3, resume=True).metrics][1] == whole[1]
    environment = tmp_path / "run" / "environment.json"
    facts = json.loads(environment.read_text())
    assert facts["began"] == "2026-11-26"
    environment.write_text(json.dumps(facts | {"began": "2026-11-27"}))
    with pytest.raises(UserError, match="the date that the chat template"):
        run(4, resume=True)
    assert run(3, overwrite=True).metrics[0]["logps/chosen"] != whole[0][1]  # the date does reach the model
    assert json.loads(environment.read_text())["began"] == "2026-11-28"


def test_touched_files_and_checkpoints_that_tell_nothing_go_on(run: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    assert len(run(2, resume=True).metrics) == 2
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    about = json.loads(state.read_text())
    assert about.pop("inputs")
    state.write_text(json.dumps(about))
    _other_row(tmp_path)
    assert len(run(3, resume=True).metrics) == 3
