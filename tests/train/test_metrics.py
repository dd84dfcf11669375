"""What metrics.jsonl says of the machine."""

from __future__ import annotations

import sys

import pytest
import torch

from fasttrain.train import metrics
from fasttrain.train.metrics import peak_memory


def test_the_peak_is_in_bytes_where_the_system_counts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS gives ru_maxrss in bytes, Linux in KiB."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    kibibytes = peak_memory(cpu)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory(cpu) == pytest.approx(kibibytes / 1024, rel=0.2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_mfu_is_measured_against_the_gpu_that_is_here(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(metrics, "_measured_rate", lambda device, dtype, size: float(size))
    found, _ = metrics.peak_rate(torch.device("cuda"), torch.bfloat16)
    assert found == (4096 if peak is None else peak * 1e12)
