"""Progress on stderr: a bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from fasttrain_data.errors import visible

_PLAIN_EVERY_S = 20.0
_quiet = False
_open: list[Progress] = []


def be_quiet() -> None:
    """Show nothing from here on: another process of the same run speaks."""
    global _quiet
    _quiet = True


def is_first(name: str) -> bool:
    """Whether this process is the first of several by `name` (RANK or LOCAL_RANK), or alone: what a launcher left tells nothing."""
    alone = os.environ.get("WORLD_SIZE", "") in ("", "0", "1")
    return alone or os.environ.get(name, "0") == "0"


def on_terminal() -> bool:
    """Whether stderr is a terminal; what a program has put in its place may not know, or be None."""
    return bool(getattr(sys.stderr, "isatty", bool)())


def close_bars() -> None:
    """Take away the bars that a failure left, so that what is said about it has a line of its own."""
    for progress in list(_open):
        progress.close()


class Progress:
    """Counts up to `total`; `note` is shown beside the count. A bar comes after `delay_s`."""

    def __init__(self, name: str, total: int, unit: str, initial: int = 0, delay_s: float = 0.0) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, initial
        self._note = ""
        self._last = time.monotonic()
        self._bar: Any = None
        if on_terminal() and not _quiet:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=name,
                unit=f" {unit}",
                file=sys.stderr,
                leave=False,
                delay=delay_s,
            )
            _open.append(self)

    def tick(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif not _quiet and time.monotonic() - self._last > _PLAIN_EVERY_S:
            self._last = time.monotonic()
            tail = f"  {self._note}" if self._note else ""
            print(
                f"{self.name}: {self.done:,} of {self.total:,} {self.unit}{tail}", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        if self in _open:
            _open.remove(self)
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def say(text: str) -> None:
    """One line of account on stderr, above any bar."""
    if _quiet:
        return
    text = visible(text)
    if on_terminal():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def ticker(name: str, total: int) -> Callable[[int], object]:
    """A counter for data preparation; short work shows nothing."""
    progress = Progress(name, total, "rows", delay_s=1.0)

    def tick(count: int) -> None:
        progress.tick(count)
        if progress.done >= total:
            progress.close()

    return tick
