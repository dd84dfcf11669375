"""What a block of work does when the process is asked to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Terminated(BaseException):
    """SIGTERM, raised where the program is, so that open work is put away and the end is told."""


def terminate() -> NoReturn:
    raise Terminated


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
    """A Ctrl-C or SIGTERM that comes while the block forks is raised at its end: Python loses one that falls into its hooks at a fork."""
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: act for number, act in heard.items() if callable(act)}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, act in before.items():
            signal.signal(number, act)
    if came:
        signal.raise_signal(came[0])
