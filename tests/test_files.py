"""Files appear whole or not at all, leftovers go without taking anything along, hashes are remembered and checked."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fasttrain.data.group_tokens import GroupTokens
from fasttrain.data.prepared_cache import ImageWitness
from fasttrain.data.token_spool import TokenSpool
from fasttrain.errors import UserError
from fasttrain.evaluate.mmbench_file import Spool
from fasttrain.files import (
    HashMemo,
    atomic_folder,
    cache_root,
    hash_file,
    remove_dead,
    remove_leftovers,
    write_atomic,
    write_json,
)
from fasttrain.train.metrics import MetricsFile


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("old", ["config.yaml"])


def test_text_bytes_and_json_are_written_as_utf8(tmp_path: Path) -> None:
    write_atomic(tmp_path / "text", "Größe")
    write_atomic(tmp_path / "bytes", b"\x00\xff")
    write_json(tmp_path / "json", {"a": "ß"})
    assert (tmp_path / "text").read_bytes() == "Größe".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert (tmp_path / "json").read_text(encoding="utf-8") == '{\n  "a": "ß"\n}\n'


def test_a_folder_is_there_only_after_its_block_ended_well(tmp_path: Path) -> None:
    target = tmp_path / "step-000001"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("1")
        assert not target.exists()
    assert names(tmp_path) == ["step-000001"] and names(target) == ["weights"]


def test_a_folder_whose_block_fails_vanishes_and_the_old_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(OSError, match="No space"), atomic_folder(target) as folder:
        (folder / "weights").write_text("new")
        full_disk()
    assert names(tmp_path) == ["final"] and (target / "weights").read_text() == "old"


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "final"
    for name in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
    assert names(tmp_path) == ["final"] and names(target) == ["new"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_a_folder_can_be_read_as_new_files_can(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors 0.8 writes for the user alone, whatever the umask: colleagues could not load an adapter."""
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "final") as folder:
            (folder / "adapter").touch(mode=0o600)
            (folder / "deeper").mkdir()
            (folder / "deeper" / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    final = tmp_path / "final"
    modes = {path.stat().st_mode & 0o777 for path in (final / "adapter", final / "deeper" / "weights")}
    assert modes == {mode}


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "final", Path.rename
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("old")
    monkeypatch.setattr(
        Path, "rename", lambda path, to: full_disk() if path.suffix == ".tmp" else rename(path, to)
    )
    with pytest.raises(OSError, match="No space"), atomic_folder(target) as folder:
        (folder / "weights").write_text("new")
    assert names(tmp_path) == ["final"] and (target / "weights").read_text() == "old"


def test_leftovers_of_a_kill_go_and_hidden_files_of_the_user_stay(tmp_path: Path) -> None:
    for name in (".config.yaml.123.tmp", ".profile.old", ".cache.tmp", "notes.1.tmp", ".env"):
        (tmp_path / name).write_text("x")
    for name in (".step-000050.9.tmp", ".final.77.old", ".ssh.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".cache.tmp", ".env", ".profile.old", ".ssh.old", "notes.1.tmp"]


def test_a_user_without_a_home_is_asked_for_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("FASTTRAIN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(UserError, match="FASTTRAIN_CACHE: wanted a folder for caches, got none, and HOME"):
        cache_root()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_root() == Path("/somewhere/fasttrain")


def test_hash_file_is_blake2b_of_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_hash_is_computed_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    path, computed = tmp_path / "image", []

    def compute(found: Path) -> str:
        computed.append(found)
        return hash_file(found)

    path.write_bytes(b"one")
    memo = HashMemo(tmp_path / "hashes.sqlite")
    assert memo(path, compute) == memo(path, compute)
    memo.close()
    memo = HashMemo(tmp_path / "hashes.sqlite")  # as a later run sees it
    before = memo(path, compute)
    assert len(computed) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))  # same size, another time
    assert memo(path, compute) != before
    path.write_bytes(b"longer")
    os.utime(path, ns=(1, 1))  # same time, another size
    memo(path, compute)
    assert len(computed) == 3
    memo.close()


def test_other_content_of_the_same_size_and_time_is_another_file(tmp_path: Path) -> None:
    """As `cp -p`, `rsync -t` or unpacking an archive leaves it."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    memo = HashMemo(tmp_path / "hashes.sqlite")
    before = memo(path)
    memo.save()
    was = path.stat()
    while path.stat().st_ctime_ns == was.st_ctime_ns:  # the clock of files ticks some hundred times a second
        path.write_bytes(b"two")
        os.utime(path, ns=(was.st_mtime_ns, was.st_mtime_ns))
    assert not memo.knows(path) and memo(path) != before
    memo.close()


def test_a_link_and_its_target_share_a_hash(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"one")
    (tmp_path / "link").symlink_to(tmp_path / "image")
    memo, computed = HashMemo(tmp_path / "hashes.sqlite"), []
    for name in ("image", "link"):
        memo(tmp_path / name, lambda path: computed.append(path) or "h")  # type: ignore[func-returns-value]
    assert computed == [(tmp_path / "image").resolve()]
    memo.close()


def test_damaged_remembered_hashes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "hashes.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=r"hashes\.sqlite: cannot use the remembered file hashes"):
        HashMemo(path)


def test_remembered_hashes_that_find_no_room_are_the_machines_failure(tmp_path: Path) -> None:
    memo, before = HashMemo(tmp_path / "hashes.sqlite"), resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "image").write_bytes(b"one")
    memo(tmp_path / "image")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"hashes\.sqlite: cannot keep file hashes: "):
            memo.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    memo.close()


def test_the_cache_stands_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("FASTTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "fasttrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "fasttrain"


def test_what_killed_processes_left_of_a_folder_goes_and_nothing_else(tmp_path: Path) -> None:
    dead = 4194399  # beyond the largest process id
    for name in (
        f".made.{dead}.tmp",
        ".made.1.tmp",
        f".other.{dead}.tmp",
        f".made.{dead}.old",
        ".made.x.tmp",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    remove_dead(tmp_path / "made")
    kept = [".made.1.tmp", f".made.{dead}.old", ".made.x.tmp", f".other.{dead}.tmp"]
    assert names(tmp_path) == sorted(kept)


def test_a_file_that_is_written_again_clears_away_what_a_kill_left_of_it(tmp_path: Path) -> None:
    (tmp_path / ".scores.json.4194399.tmp").write_text("half")
    (tmp_path / ".scores.json.1.tmp").write_text("of a living process")
    write_atomic(tmp_path / "scores.json", "whole")
    assert names(tmp_path) == [".scores.json.1.tmp", "scores.json"]


def test_an_error_names_the_file_as_it_is_to_be_called(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as file:
        write_atomic(tmp_path / "absent" / "made", "text")
    with pytest.raises(FileNotFoundError) as part, atomic_folder(tmp_path / "made") as temporary:
        write_json(temporary / "absent" / "state.json", {})
    with pytest.raises(FileNotFoundError) as other, atomic_folder(tmp_path / "made"):
        (tmp_path / "other").read_text()
    told = [str(error.value.filename) for error in (file, part, other)]
    assert told == [str(tmp_path / name) for name in ("absent/made", "made/absent/state.json", "other")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_names_the_file_also_where_nothing_can_be_cleared_away(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), *([str(_[0])] if isinstance(_[0], Path) else []))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(OSError, match=os.strerror(code)) as told:
        write_atomic(tmp_path / "made", "text")
    assert told.value.filename == str(tmp_path / "made")
    with pytest.raises(OSError, match=os.strerror(code)) as told, atomic_folder(tmp_path / "folder"):
        pass
    assert told.value.filename == str(tmp_path / "folder")


def test_a_link_in_the_place_of_a_folder_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    (tmp_path / "final").symlink_to(tmp_path / "mine")
    with atomic_folder(tmp_path / "final") as temporary:
        (temporary / "new").touch()
    assert names(tmp_path / "final") == ["new"] and names(tmp_path / "mine") == ["kept"]
    assert names(tmp_path) == ["final", "mine"]


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file may grow beyond 4 kB: the system and libraries in Rust tell that as they tell a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_finds_no_room_names_its_file(little_room: None, tmp_path: Path) -> None:
    """The system names none: `No space left on device` alone does not tell a run folder's disk from a cache's."""
    path = tmp_path / "made"

    def metrics() -> None:
        file = MetricsFile(path, 0)
        try:
            file.write({"step": "0" * 9000})
        finally:
            file.close()

    def folder(write: Callable[[Path], object]) -> None:
        with atomic_folder(path) as temporary:
            write(temporary / "weights")

    for write in (
        lambda: write_atomic(path, bytes(9000)),
        lambda: folder(lambda file: file.write_bytes(bytes(9000))),
        lambda: folder(lambda file: save_file({"a": torch.zeros(9000)}, file)),
        lambda: folder(lambda file: Tokenizer(WordLevel({"a" * 9000: 0}, unk_token="a")).save(str(file))),
        metrics,
    ):
        with pytest.raises(OSError, match="File too large") as told:
            write()
        assert told.value.filename == str(path)


def test_a_temporary_file_that_finds_no_room_names_its_folder(little_room: None, fresh_cache: Path) -> None:
    """What did not fit is tried once more when the file is closed, and failed there without a name."""
    ids = np.zeros(5000, np.int32)

    def witness() -> None:
        with contextlib.closing(ImageWitness()) as seen:
            seen.see(["x" * 9000])
            seen.written(fresh_cache)

    def tokens() -> None:
        spool = TokenSpool()
        try:
            spool.append(GroupTokens(ids, [ids], np.zeros((1, 2), np.int32)))
            spool.seal()
        finally:
            spool.discard()

    for write, folder in (
        (witness, Path(tempfile.gettempdir())),
        (tokens, fresh_cache / "spool"),
        (lambda: Spool().add(bytes(9000), "image"), fresh_cache / "spool"),
    ):
        with pytest.raises(OSError, match="File too large") as told:
            write()
        assert told.value.filename == str(folder)


def test_hashes_that_are_forgotten_are_closed_by_whatever_thread_finds_them(tmp_path: Path) -> None:
    held = [HashMemo(tmp_path / "hashes.sqlite")]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert not held  # an error in __del__ would fail the test too
