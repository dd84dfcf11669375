"""One run at a time in a run folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from fasttrain.errors import UserError

_open: set[int] = set()


class RunLock:
    """An exclusive lock of a folder. It needs no file, and costs nothing on a file system that has no locks."""

    def __init__(self) -> None:
        self._fd: int | None = None

    def take(self, folder: Path) -> None:
        """Lock the folder if it is there; UserError if another run has it."""
        if self._fd is not None or not folder.is_dir():
            return
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UserError(
                f"train.output: another run is going on in {folder}; wait for its end or name another folder"
            ) from None
        except OSError:  # no locks here
            os.close(fd)
            return
        self._fd = fd
        _open.add(fd)

    def close(self) -> None:
        if self._fd is not None:
            _open.discard(self._fd)
            os.close(self._fd)
            self._fd = None


def _in_child() -> None:
    # The lock lasts as long as a process has the folder open through it: a worker must not outlive its run with it.
    for fd in _open:
        os.close(fd)
    _open.clear()


os.register_at_fork(after_in_child=_in_child)
