"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

_EVERY_S = 10.0


class Progress:
    """Counts towards `total` (None: unknown)."""

    def __init__(self, total: int | None, unit: str, quiet: bool = False) -> None:
        self.total, self.unit, self.quiet = total, unit, quiet
        self._done = 0
        self._started_s = self._said_s = time.monotonic()
        self._bar: Any = None
        # what a program has put in its place may not know, or be None
        if not quiet and getattr(sys.stderr, "isatty", bool)():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=f" {unit}")

    def add(self, count: int = 1, note: str = "") -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            self._bar.set_postfix_str(note, refresh=False)
        elif not self.quiet and time.monotonic() - self._said_s > _EVERY_S:
            self._said_s = time.monotonic()
            rate = self._done / max(1e-9, self._said_s - self._started_s)
            of = "" if self.total is None else f" of {self.total:,}"
            print(f"{self._done:,}{of} {self.unit}, {rate:.1f}/s {note}".rstrip(), file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
