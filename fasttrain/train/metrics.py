"""metrics.jsonl: one line per logged step, read off the device in one transfer, cut back to the restored step on resume."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.files import naming, write_atomic
from fasttrain.model.routing import balance_loss
from fasttrain.run_lines import read_steps
from fasttrain.train.objective import Objective


def step_metrics(
    loss: Objective, sums: Tensor, grad_norm: Tensor | float, pairs: int, balance_weight: float = 0.0
) -> dict[str, float]:
    """Means over the step's pairs from the device's sums; the one transfer of a logged step."""
    row = torch.cat(
        [sums.float(), torch.as_tensor(grad_norm, device=sums.device).float().reshape(1)]
    ).tolist()
    return means_of(loss, row[:-1], pairs, balance_weight) | {"grad_norm": row[-1]}


def means_of(
    loss: Objective, row: Sequence[float], pairs: int, balance_weight: float = 0.0
) -> dict[str, float]:
    """The objective's metrics from its sums; with a mixture's router sums behind them also `aux_loss`, weighted in `loss`."""
    own = len(loss.names)
    means = loss.metrics(row[:own], pairs)
    if len(row) > own:
        means["aux_loss"] = float(balance_loss(torch.tensor(row[own:], dtype=torch.float64)))
        means["loss"] += balance_weight * means["aux_loss"]
    return means


def check_finite(step: int, sums: Tensor, grad_norm: Tensor) -> None:
    """UserError when the step's sums or gradient are no numbers: its update spoiled the weights, so nothing is saved."""
    if bool(torch.isfinite(sums).all() & torch.isfinite(grad_norm).all()):
        return
    raise UserError(
        f"step {step}: training has diverged (sum of losses {float(sums[0]):g}, gradient norm {float(grad_norm):g}); lower "
        "train.learning_rate or clip with train.grad_clip; checkpoints before this step are kept"
    )


class MetricsFile:
    """Append-only JSON lines; a line is complete once `write` returns. UserError if lines that are there cannot be read."""

    def __init__(self, path: Path, keep_through: int) -> None:
        self.path = path
        kept = [line for line in read_steps(path) if line["step"] <= keep_through]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.lines = len(kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        with naming(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self.lines += 1

    def sync(self) -> None:
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        with naming(self.path):
            self._file.close()


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Dense bf16 peaks of the vendors' data sheets, without sparsity, in TFLOP/s; the longer name of two comes first.
GPU_PEAK_TFLOPS = {
    "A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "B200": 2250, "L40S": 362,
    "A10": 125, "RTX 4090": 165,
}  # fmt: skip


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that mfu is measured against, and where the figure comes from."""
    # on a GPU smaller ones are over before they fill it
    size = 4096 if device.type == "cuda" else 1024
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, tflops in GPU_PEAK_TFLOPS.items():
            # an A10G is no A10, nor is an RTX 4090 D or of a laptop an RTX 4090
            if re.search(rf"\b{key}\b(?! (D|Laptop)\b)", name) and dtype != torch.float32:
                return tflops * 1e12, f"data sheet of {key}, dense bf16"
    return (
        _measured_rate(device, dtype, size),
        f"largest rate of a {size}-cube matrix product, measured at start",
    )


def _measured_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Best of half a second of products: a busy machine slows some of them, never speeds one up."""
    left = torch.randn(size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        product = left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del product
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
