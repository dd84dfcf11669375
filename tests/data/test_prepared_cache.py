"""A second start over the same files reads and tokenizes nothing, and gives the same data; any change is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttrain.config import DataConfig


@pytest.fixture
def prepared(
    tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path, fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:  # fmt: skip
    """Prepares 21 pairs of `tmp_path`/data; counts the rows that were tokenized in `.tokenized`."""
    from fasttrain.config import ModelConfig
    from fasttrain.data import group_tokens, prepared_cache
    from fasttrain.data import prepare as module
    from fasttrain.data.tokens import ChatTokenizer
    from fasttrain.files import HashMemo
    from fasttrain.model.load import load_processor, stop_token_ids

    monkeypatch.setattr(prepared_cache, "SMALLEST", 1)
    vision_pairs(tmp_path / "data", 21)
    original = group_tokens.tokenize_group

    def counted(*args: Any, **options: Any) -> Any:
        run.tokenized += 1  # type: ignore[attr-defined]
        return original(*args, **options)

    monkeypatch.setattr(group_tokens, "tokenize_group", counted)

    def run(limit: int | None = None, seed: int = 0, file: str | None = None, **settings: Any) -> Any:
        processor = load_processor(tiny_llava, ModelConfig(name=str(tiny_llava)), True)
        chat = ChatTokenizer(processor, stop_token_ids(processor, tiny_llava))
        memo = HashMemo(fresh_cache / "hashes.sqlite")
        run.tokenized = 0  # type: ignore[attr-defined]
        name = file or str(tmp_path / "data" / "pairs.jsonl")
        config = DataConfig(train=name, **settings)
        data = module.prepare(name, config, chat, memo, seed=seed, limit_pairs=limit)
        memo.close()
        return data

    return run


def described(data: Any) -> list[Any]:
    groups = [
        (g.where, g.prompt_ids.tolist(), [c.tolist() for c in g.completion_ids], g.pairs.tolist(),
         [str(ref.path) for ref in data.images(g.number)], data.image_count(g.number), data.lengths(g.number).tolist())
        for g in data
    ]  # fmt: skip
    return [groups, data.account, data.pair_counts().tolist(), data.longest(), data.completions()]


@pytest.mark.parametrize("settings", [{}, {"limit": 8, "seed": 3}, {"overflow": "drop", "max_length": 65}])
def test_a_second_start_tokenizes_nothing_and_is_the_same(
    prepared: Callable[..., Any], settings: dict[str, Any]
) -> None:
    first = prepared(**settings)
    assert prepared.tokenized and first.key  # type: ignore[attr-defined]
    second = prepared(**settings)
    assert prepared.tokenized == 0  # type: ignore[attr-defined]
    assert described(second) == described(first)
    assert first.image_state and (second.key, second.image_state) == (first.key, first.image_state)


def test_the_date_is_part_of_the_key_where_the_template_writes_it(tiny_models: Any, tmp_path: Path) -> None:
    from fasttrain.data.prepared_cache import entry_key
    from fasttrain.data.tokens import ChatTokenizer
    from fasttrain.files import HashMemo

    file, memo = tiny_models.text_pairs(tmp_path / "pairs.jsonl", 3), HashMemo(tmp_path / "hashes.sqlite")
    for written, count in (("", 1), ("{{ strftime_now('%d') }}", 2)):
        tokenizer = tiny_models.build_tokenizer(written + tiny_models.CHATML, eos="<|im_end|>")
        chats = [
            ChatTokenizer(tokenizer, [tokenizer.eos_token_id], today=date(2026, 11, n)) for n in (26, 27)
        ]
        keys = [entry_key([str(file)], [tmp_path], DataConfig(train=str(file)), chat, memo) for chat in chats]
        assert len(set(keys)) == count
    memo.close()


def test_special_tokens_are_part_of_the_key(tiny_models: Any, tmp_path: Path) -> None:
    """Other tokens in the rendered text, from an equal tokenizer and template."""
    from fasttrain.data.prepared_cache import entry_key
    from fasttrain.data.tokens import ChatTokenizer
    from fasttrain.files import HashMemo

    file, memo = tiny_models.text_pairs(tmp_path / "pairs.jsonl", 3), HashMemo(tmp_path / "hashes.sqlite")
    keys = []
    for bos in ("<s>", "<unk>"):
        tokenizer = tiny_models.build_tokenizer("{{ bos_token }}" + tiny_models.CHATML, eos="<|im_end|>")
        tokenizer.bos_token = bos
        chat = ChatTokenizer(tokenizer, [tokenizer.eos_token_id])
        keys.append(entry_key([str(file)], [tmp_path], DataConfig(train=str(file)), chat, memo))
    memo.close()
    assert keys[0] != keys[1]


def _another_row(folder: Path) -> None:
    rows = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "pairs.jsonl").write_text("\n".join(rows[1:]) + "\n")


def _touched_image(folder: Path) -> None:
    os.utime(folder / "images" / "2.png", (1, 1))


def _gone_image(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    keep = {name for row in rows if row["prompt"] != rows[0]["prompt"] for name in row.get("images", [])}
    gone = next(name for name in rows[0]["images"] if name not in keep)
    (folder / gone).unlink()


@pytest.mark.parametrize("change", [_another_row, _touched_image, _gone_image])
def test_changed_rows_and_images_are_prepared_again(
    prepared: Callable[..., Any], change: Callable[[Path], None], tmp_path: Path
) -> None:
    prepared(on_bad_row="skip")
    change(tmp_path / "data")
    prepared(on_bad_row="skip")
    assert prepared.tokenized  # type: ignore[attr-defined]


def test_the_image_state_is_another_one_when_an_image_has_changed(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    before = prepared()
    _touched_image(tmp_path / "data")
    after = prepared()
    assert before.key == after.key and before.image_state != after.image_state


def test_equal_files_in_two_folders_have_entries_of_their_own(
    prepared: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are named `pairs.jsonl`, and their rows name `images/0.png`: a picture in each."""
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    keys = []
    for folder in ("data", "other"):
        monkeypatch.chdir(tmp_path / folder)
        data = prepared(file="pairs.jsonl")
        assert prepared.tokenized  # type: ignore[attr-defined]
        keys.append(data.key)
    assert None not in keys and len(set(keys)) == 2


@pytest.mark.parametrize(
    "change", [{"max_length": 2000}, {"overflow": "drop"}, {"limit": 5}, {"limit": 5, "seed": 1}]
)
def test_other_settings_have_entries_of_their_own(
    prepared: Callable[..., Any], change: dict[str, Any]
) -> None:
    prepared()
    prepared(**change)
    assert prepared.tokenized  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", ["about.json", "tokens.npy", "pair_starts.npy", "images.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "changed"])
def test_a_damaged_entry_is_made_again(
    prepared: Callable[..., Any], file: str, damage: str, fresh_cache: Path
) -> None:
    truth = described(prepared())
    path = next((fresh_cache / "prepared").iterdir()) / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        kept = {"cut": len(content) // 2, "empty": 0, "changed": len(content) - 4}[damage]
        path.write_bytes(content[:kept] + (b"\7" * 4 if damage == "changed" else b""))
    assert described(prepared()) == truth
    assert prepared.tokenized  # type: ignore[attr-defined]


def test_rows_left_out_for_their_images_are_looked_at_again(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    _gone_image(tmp_path / "data")
    assert prepared(on_bad_row="skip").account.skipped
    assert prepared(on_bad_row="skip").key is None
    assert prepared.tokenized  # type: ignore[attr-defined]


def test_what_a_kill_left_of_an_entry_goes_when_it_is_made(
    prepared: Callable[..., Any], fresh_cache: Path
) -> None:
    """It may be as large as the entry, and would stay until eight newer ones are there."""
    entry = fresh_cache / "prepared" / prepared().key
    left = entry.with_name(f".{entry.name}.{1 << 30}.tmp")  # no process has that number
    entry.rename(left)
    prepared()
    assert entry.is_dir() and not left.exists()


def test_only_the_newest_entries_are_kept(
    prepared: Callable[..., Any], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain.data import prepared_cache

    monkeypatch.setattr(prepared_cache, "KEPT", 2)
    for length in (2000, 2001, 2002):
        prepared(max_length=length)
    assert len(list((fresh_cache / "prepared").iterdir())) == 2
    prepared(max_length=2002)
    assert prepared.tokenized == 0  # type: ignore[attr-defined]


def test_flat_counts_are_the_groups_own(prepared: Callable[..., Any]) -> None:
    data = prepared()
    data.drop(1, "for the test")
    assert data.pair_counts().tolist() == [data.pair_count(n) for n in range(len(data))]
    lengths = [data.lengths(n) for n in range(len(data))]
    sequence = max(int(one[0] + one[1:].max()) for one in lengths)
    assert data.longest() == (max(int(one.sum()) for one in lengths), sequence)
    assert data.completions() == sum(len(one) - 1 for n, one in enumerate(lengths) if n != 1)
    assert data.pair_counts().dtype == np.int64


def test_a_short_run_over_a_large_file_computes_only_its_own_references(
    tiny_text: Path,
    text_pairs: Callable[..., Path],
    tmp_path: Path,
    fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step of one pair out of 40; later all of them; then the next start asks for none."""
    from fasttrain.config import config_from_dict
    from fasttrain.data import prepared_cache
    from fasttrain.train import loop, references
    from fasttrain.train.job import build_job

    monkeypatch.setattr(prepared_cache, "SMALLEST", 1)
    raw = {
        "model": {"name": str(tiny_text)},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 40, per_prompt=(1,))), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "max_steps": 1, "pairs_per_step": 1, "seed": 3},
        "track": [],
    }
    run = loop.train_dpo(config_from_dict(raw))
    assert len(run.metrics) == 1
    job = build_job(config_from_dict(raw))
    with job.cache._open():
        assert len(job.cache) == 2
    assert references.fill_references(job, everything=True).computed == 78
    monkeypatch.setattr(references, "missing_completions", None)  # not asked any more
    job.close()
    with contextlib.closing(build_job(config_from_dict(raw))) as job:
        again = references.fill_references(job)
    assert (again.completions, again.computed) == (80, 0)
