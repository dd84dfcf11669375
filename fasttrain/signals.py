"""What a block of work does when the process is asked to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """On Linux: SIGTERM for this process when its parent ends, however that ends; also after execv, not for its own children."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


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


@contextlib.contextmanager
def interrupt_at_end() -> Iterator[None]:
    """A Ctrl-C that comes while the block forks is raised at its end: Python loses one that falls into its hooks at a fork."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
