"""The journal of paid work: append-only JSON lines by content key, safe against kill -9 at any byte."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.jsonl import Row, dump_row, naming, parse_line, read_lines
from fasttrain_data.spill import OffsetIndex

# SIGKILL loses nothing that was written; fsync is for power cuts, and every reply need not wait for one.
_SYNC_EVERY_S = 1.0


class Journal:
    """Entries by key; the last entry of a key counts. One process at a time.

    Each entry is one line with its `key`, written by one write call. A line torn by a kill is cut off when the
    journal is opened again. Memory does not grow with it: keys live in a temporary index on disk.
    """

    def __init__(self, path: Path, visit: Callable[[Row], None] = lambda row: None) -> None:
        """Open or create; `visit` sees every entry there is, replaced ones included, oldest first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._is_new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        # a file without a name was removed by the process that had it
        if self._is_locked_elsewhere() or not os.fstat(self._file).st_nlink:
            os.close(self._file)
            raise UserError(f"{path}: another process is writing this journal; wait for it or stop it")
        self._end = self._cut_torn_line()
        self._synced_s = time.monotonic()
        self._index = OffsetIndex()
        for offset, place, row in read_lines(path):
            if not _is_hash(row.get("key")):
                raise BadRow(path, place, "key", "a content hash", row.get("key"))
            self._index.put(row["key"], offset)
            visit(row)

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: str) -> Row | None:
        offset = self._index.get(key)
        return None if offset is None else self._read_at(offset)

    def append(self, key: str, entry: dict[str, Any]) -> None:
        """Write an entry; when this returns, a killed process has not lost it."""
        line = (dump_row({"key": key, **entry}) + "\n").encode()
        offset = self._end
        with naming(self.path):
            written = os.write(self._file, line)
            if written < len(line):
                os.ftruncate(self._file, offset)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += written
        self._index.put(key, offset)
        if time.monotonic() - self._synced_s > _SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        with naming(self.path):
            os.fsync(self._file)
        self._synced_s = time.monotonic()

    def close(self, *, keep_empty: bool = True) -> None:
        if not keep_empty and not self._end:  # while it is locked: nobody is writing to it
            self.path.unlink(missing_ok=True)
        self.sync()
        os.close(self._file)
        self._index.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # what fails before its first entry leaves no file behind
        self.close(keep_empty=kind is None or not self._is_new)

    def _is_locked_elsewhere(self) -> bool:
        """Lock the file, unless another process has; a file system without locks has nothing to say."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return False

    def _read_at(self, offset: int) -> Row:
        line, at = b"", offset
        while True:
            part = os.pread(self._file, 1 << 16, at)
            head, newline, _ = part.partition(b"\n")
            line += head
            at += len(part)
            if newline or not part:
                return parse_line(line, self.path, f"byte {offset}")

    def _cut_torn_line(self) -> int:
        """Cut off what follows the last line break; returns the file's length after that."""
        size = at = os.fstat(self._file).st_size
        while at:
            start = max(0, at - (1 << 16))
            newline = os.pread(self._file, at - start, start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < size:
            os.ftruncate(self._file, at)
        return at


def _is_hash(key: object) -> bool:
    try:
        return isinstance(key, str) and bool(bytes.fromhex(key))
    except ValueError:
        return False


def journal_path(output: Path) -> Path:
    """Where a stage that writes `output` keeps its journal: `x.jsonl` -> `x.journal.jsonl`."""
    return output.with_name(f"{output.stem}.journal.jsonl")
