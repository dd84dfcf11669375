"""Content hashes of a run's large files, made by another process while this one imports torch on one core."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from fasttrain.config import DPOConfig
from fasttrain.files import HashMemo, cache_root, user_path
from fasttrain.progress import is_first

_WORTH = 1 << 26  # bytes from which on a process is worth starting

_hashing: dict[Path, BaseProcess] = {}
# a worker of this process may not ask after its sibling
os.register_at_fork(after_in_child=lambda: _hashing.clear())


def hash_ahead(config: DPOConfig) -> None:
    """Begin to hash the training pairs and the weights of a model folder for every `HashMemo` of this process to find.

    By a fork: only where nothing has started threads. Nothing on other systems than Linux, on one core, for small files, or
    on another rank than the first of a machine.
    """
    if sys.platform != "linux" or not is_first("LOCAL_RANK") or len(os.sched_getaffinity(0)) < 2:
        return
    try:
        files = [file.resolve() for file in _files(config)]
        if sum(file.stat().st_size for file in files) < _WORTH:
            return
    except (OSError, RuntimeError):  # told when the files are opened; links in a circle are a RuntimeError
        return
    process = multiprocessing.get_context("fork").Process(target=_hash, args=(files,), daemon=True)
    process.start()
    _hashing.update(dict.fromkeys(files, process))
    HashMemo.elsewhere = _wait  # type: ignore[method-assign]


def _files(config: DPOConfig) -> list[Path]:
    """Pairs first: they are asked for first."""
    train = config.data.train
    files = []
    for path in map(user_path, [train] if isinstance(train, str) else train):
        files += [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return [*files, *sorted(user_path(config.model.name).glob("*.safetensors"))]


def _hash(files: list[Path]) -> None:
    """In the other process; whatever goes wrong there goes wrong again where it is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by this
    with contextlib.suppress(Exception), contextlib.closing(HashMemo(cache_root() / "hashes.sqlite")) as memo:
        for file in files:
            memo(file)
            memo.save()


def _wait(self: HashMemo, file: Path) -> None:
    """Until the other process has hashed the file, or has ended."""
    process = _hashing.get(file)
    while process is not None and process.is_alive() and not self.knows(file):
        time.sleep(0.01)
