"""Runs triton_interpreted.py, the tests of the Triton kernels, where Triton's interpreter is on from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_triton_kernel_agrees_with_its_reference_in_the_interpreter(repository: Path) -> None:
    pytest.importorskip("triton")
    tests = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
