"""Keys and groups on disk instead of in memory: a private SQLite file that vanishes with the process."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any


class _Connection(sqlite3.Connection):
    """OSError where the disk has no room for the temporary file."""

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*arguments)
        except sqlite3.OperationalError as error:
            raise OSError(
                f"no room for temporary files ({error}); SQLITE_TMPDIR may name another folder"
            ) from None


class Spill:
    """A temporary database tuned for one writer; nothing in it outlives the object.

    SQLite's empty file name means an unlinked temporary file, cached in a few MB of memory.
    """

    def __init__(self, *tables: str) -> None:
        self.database = sqlite3.connect(
            "", isolation_level=None, check_same_thread=False, factory=_Connection
        )
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-4000"):
            self.database.execute(f"PRAGMA {pragma}")
        for table in tables:
            self.database.execute(table)
        self.database.execute("BEGIN")

    def close(self) -> None:
        self.database.close()

    def __del__(self) -> None:
        """Python 3.13 warns of databases that end with whoever opened them."""
        if "database" in vars(self):
            self.close()


class OffsetIndex(Spill):
    """Key (hex) -> byte offset; a later offset replaces an earlier one."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE offsets (key BLOB PRIMARY KEY, offset INTEGER) WITHOUT ROWID")

    def put(self, key: str, offset: int) -> None:
        self.database.execute("INSERT OR REPLACE INTO offsets VALUES (?, ?)", (bytes.fromhex(key), offset))

    def get(self, key: str) -> int | None:
        row = self.database.execute(
            "SELECT offset FROM offsets WHERE key = ?", (bytes.fromhex(key),)
        ).fetchone()
        return None if row is None else int(row[0])

    def __len__(self) -> int:
        return int(self.database.execute("SELECT count(*) FROM offsets").fetchone()[0])


class Groups(Spill):
    """Byte offsets of rows, by group; groups come back in the order of their first row."""

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE groups (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID",
            "CREATE TABLE members (number INTEGER, offset INTEGER, PRIMARY KEY (number, offset)) WITHOUT ROWID",
        )
        self._count = 0

    def add(self, key: str, offset: int) -> None:
        """Put the row at `offset` into the group `key` (hex)."""
        raw = bytes.fromhex(key)
        row = self.database.execute("SELECT number FROM groups WHERE key = ?", (raw,)).fetchone()
        if row is None:
            row = (self._count,)
            self._count += 1
            self.database.execute("INSERT INTO groups VALUES (?, ?)", (raw, row[0]))
        self.database.execute("INSERT INTO members VALUES (?, ?)", (row[0], offset))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        offsets: list[int] = []
        current = 0
        rows = self.database.execute("SELECT number, offset FROM members ORDER BY number, offset")
        for number, offset in rows:
            if number != current and offsets:
                yield offsets
                offsets = []
            current = number
            offsets.append(offset)
        if offsets:
            yield offsets


class KeyCounts(Spill):
    """How often each hex key was added."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE counts (key BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")

    def add(self, key: str) -> int:
        """How often the key is there now, this time included."""
        raw = bytes.fromhex(key)
        row = self.database.execute("SELECT times FROM counts WHERE key = ?", (raw,)).fetchone()
        times = 1 if row is None else int(row[0]) + 1
        self.database.execute("INSERT OR REPLACE INTO counts VALUES (?, ?)", (raw, times))
        return times


class SeenKeys(Spill):
    """A set of hex keys."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, key: str) -> bool:
        """True if the key is new."""
        cursor = self.database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (bytes.fromhex(key),))
        return cursor.rowcount == 1

    def __contains__(self, key: str) -> bool:
        found = self.database.execute("SELECT 1 FROM seen WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        return found is not None
