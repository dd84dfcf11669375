"""What a block of work does when the process is asked to end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_sigterm(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` at SIGTERM while the block runs; only the main thread may listen, elsewhere nothing changes."""
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: act())
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
