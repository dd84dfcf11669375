"""The reference cache: what it returns is what was stored, or an error that names the file."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttrain.errors import UserError
from fasttrain.reference.cache import ReferenceCache
from fasttrain.reference.key import CompletionKeys


def rows(count: int, seed: int = 0) -> list[tuple[bytes, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.bytes(20), rng.normal(size=rng.integers(1, 300)).astype(np.float32)) for _ in range(count)]


def test_round_trip_is_exact_and_survives_reopening(tmp_path: Path) -> None:
    stored = rows(1203)
    ReferenceCache(tmp_path / "a.sqlite", {"model": "m"}).put(stored)
    cache = ReferenceCache(tmp_path / "a.sqlite", {"model": "m"})
    found = cache.get([key for key, _ in stored])
    assert len(cache) == len(found) == 1203
    for key, logp in stored:
        assert found[key].dtype == np.float32
        np.testing.assert_array_equal(found[key], logp)
    assert cache.missing([stored[0][0], b"x" * 20]) == [False, True]


def test_first_value_stays(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "a.sqlite", {})
    key = b"k" * 20
    cache.put([(key, np.ones(3, np.float32))])
    cache.put([(key, np.zeros(3, np.float32))])
    np.testing.assert_array_equal(cache.get([key])[key], np.ones(3))


def test_a_cache_that_nobody_closed_closes_its_database(tmp_path: Path) -> None:
    """As a damaged one, which is never anybody's: Python 3.13 warns of what is left open, and warnings are errors in this suite."""
    database = ReferenceCache(tmp_path / "a.sqlite", {})._open()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        database.execute("SELECT 1")


@pytest.mark.parametrize("column", ["logp", "checksum", "key"])
def test_a_flipped_bit_is_an_error_or_a_miss_never_a_number(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.sqlite"
    ((key, _),) = stored = rows(1)
    ReferenceCache(path, {}).put(stored)
    with sqlite3.connect(path) as database:
        (value,) = database.execute(f"SELECT {column} FROM logps").fetchone()
        flipped = bytes([value[0] ^ 1]) + value[1:]
        database.execute(f"UPDATE logps SET {column} = ?", (flipped,))
    cache = ReferenceCache(path, {})
    if column == "key":
        assert cache.get([key]) == {}
        key = flipped
    with pytest.raises(UserError, match=r"a\.sqlite: the reference cache is damaged"):
        cache.get([key])


def test_a_row_that_was_lost_is_looked_for_at_the_next_start(first_step: Callable[..., Any]) -> None:
    """Of many pairs a mark says that all are there; with it left standing no later start would compute the row."""
    job, step, _ = first_step("text", [])
    job.cache.mark_complete("all of it")
    with sqlite3.connect(job.cache.path) as database:
        database.execute("DELETE FROM logps")
    found = job.maker(job.train, with_reference=True)[step.packs[0]]
    assert isinstance(found, UserError) and "run again" in str(found)
    assert not job.cache.is_complete("all of it")


@pytest.mark.parametrize("damage", ["garbage", "truncated", "middle"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.sqlite"
    stored = rows(400)
    ReferenceCache(path, {}).put(stored)
    content = bytearray(path.read_bytes())
    if damage == "garbage":
        content = bytearray(os.urandom(len(content)))
    elif damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[4096:] = bytes(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.sqlite"):
        found = ReferenceCache(path, {}).get([key for key, _ in stored])
        for key, logp in stored:  # what does come back must be right
            np.testing.assert_array_equal(found[key], logp)


def test_a_file_that_may_only_be_read_serves_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a colleague has filled, or on a disk that is mounted for reading only."""
    path, connect = tmp_path / "a.sqlite", sqlite3.connect
    ((key, logp),) = stored = rows(1)
    ReferenceCache(path, {}).put(stored)
    # not by the file's mode: root may write whatever that is
    monkeypatch.setattr(
        sqlite3, "connect", lambda path, **how: connect(f"file:{path}?mode=ro", uri=True, **how)
    )
    cache = ReferenceCache(path, {})
    cache.mark_complete("all of it")
    assert not cache.is_complete("all of it")
    np.testing.assert_array_equal(cache.get([key])[key], logp)
    with pytest.raises(OSError, match=r"a\.sqlite: cannot use the reference cache: .*readonly"):
        cache.put(rows(1, seed=1))


def _read(path: Path, keys: list[bytes], go: object) -> None:
    cache = ReferenceCache(path, {})
    for _ in range(50):
        assert len(cache.get(keys)) == len(keys)


def _write(path: Path, seed: int) -> None:
    cache = ReferenceCache(path, {})
    for part in range(20):
        cache.put(rows(10, seed * 100 + part))


def test_several_processes_read_and_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    stored = rows(50)
    cache = ReferenceCache(path, {})
    cache.put(stored)
    cache.get([stored[0][0]])  # an open connection that forked children must not use
    keys = [key for key, _ in stored]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(path, seed)) for seed in (1, 2)]
    processes += [context.Process(target=_read, args=(path, keys, None)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(cache) == 50 + 2 * 20 * 10


def test_every_part_of_the_key_matters() -> None:
    prompt, answer = np.array([5, 6, 7], np.int32), [np.array([8, 9], np.int32)]
    base = CompletionKeys("model", "pixels").of_group(prompt, ["image"], answer)[0]
    others = [
        CompletionKeys("other model", "pixels").of_group(prompt, ["image"], answer),
        CompletionKeys("model", "other pixels").of_group(prompt, ["image"], answer),
        CompletionKeys("model", "pixels").of_group(prompt, ["other image"], answer),
        CompletionKeys("model", "pixels").of_group(prompt, [], answer),
        CompletionKeys("model", "pixels").of_group(prompt, ["image", "image"], answer),
        CompletionKeys("model", "pixels").of_group(np.array([5, 6], np.int32), ["image"], answer),
        CompletionKeys("model", "pixels").of_group(prompt, ["image"], [np.array([8, 9, 1], np.int32)]),
        # the border between prompt and completion is part of the key
        CompletionKeys("model", "pixels").of_group(
            np.array([5, 6], np.int32), ["image"], [np.array([7, 8, 9], np.int32)]
        ),
    ]
    keys = [base, *(keys[0] for keys in others)]
    assert len(set(keys)) == len(keys)
    # and image settings do not matter to a row without images
    text = [CompletionKeys("model", pixels).of_group(prompt, [], answer)[0] for pixels in ("a", "b")]
    assert text[0] == text[1]
