"""What metrics.jsonl says of the machine."""

from __future__ import annotations

import sys

import pytest
import torch

from fasttrain.train.metrics import peak_memory


def test_the_peak_is_in_bytes_where_the_system_counts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS gives ru_maxrss in bytes, Linux in KiB."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    kibibytes = peak_memory(cpu)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory(cpu) == pytest.approx(kibibytes / 1024, rel=0.2)
