"""Worker processes end with the program, whatever happens to whoever started them."""

from __future__ import annotations

import subprocess
import sys

LEAVES_ONE_OPEN = """
import builtins
from fasttrain.data.ahead import in_order
builtins.kept = in_order(abs, range(1000), 2)
print(next(builtins.kept), flush=True)
"""


def test_a_program_ends_although_nobody_closed_a_loader() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_ONE_OPEN], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


WORKER = """
import multiprocessing, os, sys, threading
from multiprocessing import resource_sharer
from multiprocessing.connection import Client
from fasttrain.data.ahead import start_worker

start_worker(0)
if sys.argv[1] == "other":
    sys.excepthook(ValueError, ValueError("wrong"), None)
handed = resource_sharer.DupFd(os.open(os.devnull, os.O_RDONLY))
address, key = handed._id
with Client(address, authkey=multiprocessing.current_process().authkey) as parent:
    parent.send((key + 1 if sys.argv[1] == "other" else key, os.getpid()))  # and is gone before it takes anything
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join(1)
"""


def test_a_worker_says_nothing_of_a_parent_that_went_while_a_tensor_was_handed_over() -> None:
    gone, other = (
        subprocess.run([sys.executable, "-c", WORKER, kind], capture_output=True, text=True, timeout=120)
        for kind in ("gone", "other")
    )
    assert (gone.returncode, gone.stderr) == (0, "")
    assert "ValueError: wrong" in other.stderr and "KeyError" in other.stderr
