"""Work done ahead of where it is wanted, in other processes, its results in order."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Any

from fasttrain.errors import UserError
from fasttrain.signals import interrupt_at_end


class _Calls:
    """A function as a data set: what the loader fetches is its value for an item. A mistake comes back as a value."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:  # raised in a worker it would arrive as a traceback
            return UserError(str(error))


def start_worker(_: int) -> None:
    """The parent decides when work ends; a signal to the whole process group must not kill its workers first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _unless_parent_is_gone


def _unless_parent_is_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """For multiprocessing's thread in a worker, which is cut short in handing a tensor over when the parent is interrupted."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def started(loader: Any) -> Iterator[Any]:
    """The iterator of a DataLoader, whose workers are forked here and end with the program at the latest."""
    with interrupt_at_end():
        values: Iterator[Any] = iter(loader)
    if loader.num_workers:
        _end_workers_at_exit()
        _LIVE.add(values)
    return values


@functools.cache
def _end_workers_at_exit() -> None:
    """Python ends children by a SIGTERM, which workers ignore, and waits: a loader that nobody closed would keep it for ever.

    Registered once torch has registered what it does at the end, so that this comes before.
    """

    def end() -> None:
        for values in list(_LIVE):
            values._shutdown_workers()

    atexit.register(end)


def itself(value: Any) -> Any:
    return value


def processes() -> int:
    """How many processes one rank of this machine may use for preparing data."""
    if sys.platform != "linux":
        return 0
    return max(1, min(16, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def in_order(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, ahead: int = 2
) -> Generator[Any]:
    """`function` of every item, in order; `workers` processes are forked at the call and are `ahead` items each.

    Without workers the items are worked on as they are asked for.
    """
    if not workers:
        return _here(function, items)
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Calls(function),  # type: ignore[arg-type]
        batch_size=None,
        sampler=items,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=ahead,
        collate_fn=itself,
        multiprocessing_context="fork",
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the global one belongs to dropout: a loader must not draw from it
    )
    return _raised(started(loader))


def _here(function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any]:
    for item in items:
        yield function(item)


def _raised(values: Iterable[Any]) -> Generator[Any]:
    for value in values:
        if isinstance(value, UserError):
            raise value
        yield value
