"""Reference log-probs on disk: one SQLite file per reference model, fp32 per token, one row per completion.

SQLite gives crash safety, several processes at once and look-ups that do not slow down as the file grows; each row carries a
checksum, so damage is an error and never a wrong number.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.errors import UserError
from fasttrain.files import cache_root, user_path

_LOOKUP = 500  # keys per query; SQLite allows 999 parameters everywhere


def cache_folder(setting: str) -> Path:
    return cache_root() / "reference" if setting == "auto" else user_path(setting)


def _checksum(key: bytes, value: bytes) -> bytes:
    return blake2b(key + value, digest_size=8).digest()


class ReferenceCache:
    """Per-token log-probs by completion key. Safe to use from forked workers: every process opens its own connection."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._inherited: list[sqlite3.Connection | None] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT)")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, logp BLOB NOT NULL, checksum BLOB NOT NULL)"
                )
            self._note("model", json.dumps(identity))
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None
        except OSError as error:
            raise UserError(f"reference.cache: cannot write {path.parent}: {error.strerror}") from None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._owner != os.getpid():
            self._inherited.append(self._connection)  # a fork's connection is not this process's to close
            self._connection = sqlite3.connect(self.path, timeout=120, check_same_thread=False)
            self._owner = os.getpid()
        return self._connection

    def _damaged(self, error: object) -> UserError | OSError:
        if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
            # locked, read-only, no room: the machine's, and the file itself is sound
            return OSError(f"{self.path}: cannot use the reference cache: {error}")
        return UserError(
            f"{self.path}: the reference cache is damaged ({error}); delete the file and run again"
        )

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Log-probs (fp32, one per token) of the keys that are cached; UserError if a stored row is damaged."""
        found: dict[bytes, np.ndarray] = {}
        try:
            for start in range(0, len(keys), _LOOKUP):
                part = list(keys[start : start + _LOOKUP])
                marks = ",".join("?" * len(part))
                for key, value, checksum in self._open().execute(
                    f"SELECT key, logp, checksum FROM logps WHERE key IN ({marks})", part
                ):
                    if not isinstance(value, bytes) or _checksum(key, value) != checksum:
                        raise self._damaged(f"checksum of row {bytes(key).hex()[:12]} does not match")
                    found[key] = np.frombuffer(value, "<f4")
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None
        return found

    def missing(self, keys: Sequence[bytes]) -> list[bool]:
        """For every key, whether it still has to be computed."""
        found = self.get(keys)
        return [key not in found for key in keys]

    def put(self, rows: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Store rows durably, all or none; rows that another process stored first stay as they are."""
        values = []
        for key, logp in rows:
            value = np.ascontiguousarray(logp, "<f4").tobytes()
            values.append((key, value, _checksum(key, value)))
        try:
            with self._open() as database:
                database.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?, ?)", values)
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def is_complete(self, name: str) -> bool:
        """Whether `mark_complete` was told that this cache holds all of `name`."""
        query = "SELECT 1 FROM about WHERE name = ?"
        try:
            return self._open().execute(query, (f"complete {name}",)).fetchone() is not None
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def mark_complete(self, name: str) -> None:
        """Remember that every completion of `name` is here, so that the next run need not look for each."""
        try:
            self._note(f"complete {name}", "yes")
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def _note(self, name: str, value: str) -> None:
        """Write into `about` what no look-up needs; not into a file that others fill and this process may only read."""
        try:
            with self._open() as database:
                database.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", (name, value))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:
                raise

    def forget_complete(self) -> None:
        """Let the next run look for each completion again: one that should be here is not."""
        try:
            with self._open() as database:
                database.execute("DELETE FROM about WHERE name LIKE 'complete %'")
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def __len__(self) -> int:
        return int(self._open().execute("SELECT COUNT(*) FROM logps").fetchone()[0])

    def close(self) -> None:
        if self._connection is not None and self._owner == os.getpid():
            self._connection.close()
        self._connection = None

    def __del__(self) -> None:
        """Python 3.13 warns of databases that end with whoever opened them, as with a cache that is damaged."""
        self.close()
