"""Files that appear whole or not at all, and content hashes that are remembered."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fasttrain.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEFTOVER = re.compile(r"\..+\.\d+\.(tmp|old)")  # .name.pid.tmp


def cache_root() -> Path:
    """Folder of everything fasttrain caches: $FASTTRAIN_CACHE, else $XDG_CACHE_HOME or ~/.cache, plus fasttrain."""
    if folder := os.environ.get("FASTTRAIN_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "fasttrain"
    try:
        return Path.home() / ".cache" / "fasttrain"
    except RuntimeError:  # a container's user without a name
        raise UserError(
            "FASTTRAIN_CACHE: wanted a folder for caches, got none, and HOME is not set"
        ) from None


def user_path(name: str | Path) -> Path:
    """A path as a recipe names it, `~` being the user's home; where there is no such home, as it is written."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (Path's own raises for a user that is not known)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None, *, reads: bool = False) -> Iterator[None]:
    """For a block that writes to `path`: OSError with its name when a write fails, which the system tells without one.

    What is under `temporary`, which is to become `path`, is told by the name it is to have. reads: the block may also read
    other files, so that only a full disk is known to be this one's.
    """
    try:
        yield
    except Exception as error:
        number, told = _failure(error, reads), getattr(error, "filename", None)
        if isinstance(error, OSError) and temporary and str(told).startswith(str(temporary)):
            name = str(path) + str(told).removeprefix(str(temporary))
            raise OSError(error.errno, error.strerror, name) from None
        if number is None or told is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def _failure(error: Exception, reads: bool) -> int | None:
    """The system's number of a failed write, also from libraries in Rust (safetensors, tokenizers), which tell it in words."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return number if number in _NO_ROOM or not reads else None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, never half of it."""
    remove_dead(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, temporary):
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the same disk may fail again
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path, *, reads: bool = True) -> Iterator[Path]:
    """A folder to fill; it takes the name `path` only when the block ends well, and vanishes when it does not.

    reads: as in `naming`, whether the block may also read files, whose failures are not this folder's.
    A folder that stands at `path` already is replaced. Its files can be read by whoever may read new files here: safetensors
    writes its own for the user alone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(path, temporary, reads=reads):
            temporary.mkdir(parents=True)
            yield temporary
        with naming(path, temporary):
            readable = temporary.stat().st_mode & 0o444
            for file in [temporary, *temporary.rglob("*")]:
                handle = os.open(file, os.O_RDONLY)
                try:
                    mode = os.fstat(handle).st_mode & 0o7777
                    if readable & ~mode:
                        os.fchmod(handle, mode | readable)
                    os.fsync(handle)
                finally:
                    os.close(handle)
            _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = _aside(path)
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    if old.is_symlink():  # what it leads to is the user's
        old.unlink()
    else:
        shutil.rmtree(old)


def _aside(path: Path) -> Path:
    """The free name beside a folder under which it may be deleted bit by bit."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)  # left by a killed process of the same number
    return old


def delete_whole(path: Path) -> None:
    """Delete a folder so that a kill leaves all of it, or only what `remove_leftovers` clears away."""
    old = _aside(path)
    path.rename(old)
    shutil.rmtree(old)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed `atomic_folder` or `write_atomic` left beside its target, and nothing else."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            _delete(path)


def remove_dead(path: Path) -> None:
    """Delete what a killed `atomic_folder` or `write_atomic` left of `path` itself; that of a living process is kept."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not _is_alive(int(pid)):
            _delete(left)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def hash_file(path: Path) -> str:
    """blake2b-128 of a file's content, hex."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def file_state(path: str | Path) -> tuple[int, int, int]:
    """What tells that a file has changed since it was last seen: its size, and when content and file were changed, in ns."""
    found = os.stat(path)  # noqa: PTH116 (a million times: a Path would cost more than the call)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class HashMemo:
    """Content hashes by path, size and times, kept in a SQLite file so that nothing is read twice.

    Of the times a tool can put back the modification's (`cp -p`, `rsync`, `tar`), the change's only the system's clock.
    """

    def __init__(self, path: Path) -> None:
        import sqlite3

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._new: dict[str, tuple[str, int, int, int]] = {}
        with self._errors_named():
            # one thread at a time uses it; it may be another that finds it forgotten
            self._database = sqlite3.connect(path, timeout=60, check_same_thread=False)
            with self._database:
                self._database.execute(
                    "DROP TABLE IF EXISTS files"
                )  # an earlier version's, without the change's time
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS hashes "
                    "(path TEXT PRIMARY KEY, hash TEXT, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER)"
                )

    def __call__(self, path: Path, compute: Callable[[Path], str] = hash_file) -> str:
        resolved = path.resolve()
        state = file_state(resolved)
        self.elsewhere(resolved)
        row = self._new.get(str(resolved)) or self._stored(str(resolved))
        if row and row[1:] == state:
            return str(row[0])
        digest = compute(resolved)
        self._new[str(resolved)] = (digest, *state)
        if len(self._new) >= 1000:
            self.save()
        return digest

    def elsewhere(self, file: Path) -> None:
        """Wait while another process of this program hashes the file; `hash_ahead` puts its own in place."""

    def knows(self, path: Path) -> bool:
        """Whether the file's hash is remembered and the file has not changed since."""
        resolved = path.resolve()
        row = self._new.get(str(resolved)) or self._stored(str(resolved))
        return bool(row and row[1:] == file_state(resolved))

    def _stored(self, path: str) -> Any:
        query = "SELECT hash, size, mtime_ns, ctime_ns FROM hashes WHERE path = ?"
        with self._errors_named():
            return self._database.execute(query, (path,)).fetchone()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        import sqlite3

        try:
            yield
        except sqlite3.OperationalError as error:  # locked, read-only, no room: the file itself is sound
            raise OSError(f"{self.path}: cannot keep file hashes: {error}") from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: cannot use the remembered file hashes: {error}; delete the file and run again"
            ) from None

    def save(self) -> None:
        with self._errors_named(), self._database:
            self._database.executemany(
                "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)",
                [(path, *row) for path, row in self._new.items()],
            )
        self._new.clear()

    def close(self) -> None:
        self.save()
        self._database.close()

    def __del__(self) -> None:
        """Python 3.13 warns of databases that end with whoever opened them, as with a job that is refused half-way."""
        if "_database" in vars(self):
            self._database.close()
