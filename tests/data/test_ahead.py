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
