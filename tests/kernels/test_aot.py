"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, and without spilling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def rows(report: str) -> set[tuple[str, str]]:
    """(kernel, architecture) of every line of the compile table."""
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")
    ]
    return {(c[0], c[1]) for c in cells if len(c) > 1 and c[1] in ARCHITECTURES}


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_and_the_committed_table_lists_it(
    repository: Path, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "bench/aot.py"], cwd=repository, env=environment, capture_output=True, text=True
    )
    # The script exits 1 on a spill, on too much shared memory, on a missing wide load or matrix instruction.
    assert done.returncode == 0, done.stderr[-4000:]
    made = rows(done.stdout)
    assert made == rows((repository / "bench/results/kernels_aot.md").read_text())
    assert {arch for _, arch in made} == set(ARCHITECTURES)
    assert len(made) >= 3 * 7


def test_a_spill_a_missing_instruction_and_oversized_shared_memory_are_faults(repository: Path) -> None:
    pytest.importorskip("triton")
    code = """
import dataclasses, aot, aot_cases
case = dataclasses.replace(aot_cases.cases()[0], matrix=True)
bad = aot.Compiled(case, 80, 255, 8, 4, 200 << 10, 0, 0, 9, 0, 1)
good = aot.Compiled(case, 80, 32, 0, 0, 64, 4, 4, 9, 0, 1)
print(len(bad.faults()), len(good.faults()), good.occupancy)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository / "bench", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4", "0", "1.0"]
