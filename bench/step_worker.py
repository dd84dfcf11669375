"""One contender of step.py in a process of its own, so that its peak memory is its own: takes orders on stdin as JSON lines.

{"do": "step"}   one step: loss, seconds by the clock and of the processor
{"do": "count"}  one more step under counters: operations, most bytes of tensors
{"do": "rate"}   this machine's rate of fp32 matrix products, at this moment, with the same threads
{"do": "rest"}   give free memory back to the kernel
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def _peak_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def _timed(contender: Any) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    loss = contender.step()
    return {"loss": loss, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
            "peak_rss": _peak_rss()}  # fmt: skip


def _counted(contender: Any, threads: int) -> dict[str, int]:
    """Operations and peak of one step. One thread: products on the head's own threads would escape the counter."""
    import torch
    from step_flops import counter

    torch.set_num_threads(1)
    with counter() as flops:
        contender.step()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        contender.step()
    torch.set_num_threads(threads)
    level = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return {"flops": flops.get_total_flops(), "tensor_peak": peak}


def _rate() -> dict[str, float]:
    """Best of a few large products, by the clock and per second of processor time."""
    import torch

    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    walls, cpus = [], []
    for _ in range(4):
        wall, cpu = time.perf_counter(), time.process_time()
        left @ right
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    flops = 2 * 2048**3
    return {"rate": flops / min(walls), "rate_cpu": flops / min(cpus)}


def _rest() -> dict[str, float]:
    """Free memory goes back to the kernel, for the others: glibc keeps it otherwise."""
    ctypes.CDLL(None).malloc_trim(0)
    return {}


def main() -> None:
    """`step_worker.py NAME FILES.json THREADS`; answers one JSON line per order."""
    name, described, threads = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    warnings.simplefilter("ignore")
    sys.path.append(
        sys.path.pop(0)
    )  # transformers looks for a package called kernels, which is a script here
    if name == "fasttrain":
        from fasttrain.command import leave_triton_out

        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # as the command leaves it out
        leave_triton_out()
    import torch
    from step_cases import CASES
    from step_contenders import Files, make

    torch.set_num_threads(threads)
    paths = {key: Path(described[key]) for key in ("model", "pairs", "adapter", "folder")}
    contender = make(name, Files(case=CASES[described["case"]], rank=described["rank"], **paths))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the steps, not of loading
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    print(json.dumps({"ready": True, "loaded_rss": before}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)["do"]
        answer = {
            "step": lambda: _timed(contender),
            "count": lambda: _counted(contender, threads),
            "rate": _rate,
            "rest": _rest,
        }
        print(json.dumps(answer[order]()), file=answers, flush=True)


if __name__ == "__main__":
    main()
