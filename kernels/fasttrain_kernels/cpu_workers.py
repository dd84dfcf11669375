"""Threads that each run torch on one core, for chains of operations too short to be worth splitting one by one.

Split by OpenMP, every operation of a chain ends with all threads waiting for the slowest; when anything else runs on the
machine each of those waits can cost a time slice. Here a thread runs its whole chain, and they meet once, at the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _forget_threads() -> None:
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # A forked child has none of its parent's threads, and may have caught the lock closed.
    os.register_at_fork(after_in_child=_forget_threads)


def _pool(count: int) -> ThreadPoolExecutor:
    with _lock:
        if count not in _pools:
            threads = torch.get_num_threads()
            pool = ThreadPoolExecutor(count, "fasttrain-kernels", _use_one_core)
            ready = threading.Barrier(count)
            list(pool.map(lambda _: ready.wait(), range(count)))
            # set_num_threads acts on its own thread and on threads not started yet: give the latter their number back.
            torch.set_num_threads(threads)
            _pools[count] = pool
        return _pools[count]


def _use_one_core() -> None:
    # A thread's first operation takes torch's number of threads over whatever was set before: let that happen now.
    torch.get_num_threads()
    torch.set_num_threads(1)


def run_on_workers(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Results of the tasks in order, without gradients; each task runs on one core of a thread of its own.

    A single task runs where it is called, with all of torch's threads. The first exception is raised.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    run = partial(_without_gradients, torch.is_inference_mode_enabled())
    return list(_pool(min(len(tasks), torch.get_num_threads())).map(run, tasks))


def _without_gradients(inference: bool, task: Callable[[], T]) -> T:
    # Whether gradients are recorded is a thread's own setting, on by default; so is inference mode, outside which the
    # caller's buffers could not be written.
    with torch.inference_mode(inference), torch.no_grad():
        return task()
