"""Versions, devices, and which backend is picked and why: `fasttrain env` and environment.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "fasttrain-dpo", "torch", "triton", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pillow", "pyarrow",
    "bitsandbytes", "deepspeed", "flash-attn", "kernels", "liger-kernel", "trl", "google-genai", "google-generativeai",
)  # fmt: skip


def collect_facts() -> dict[str, Any]:
    """What one needs to know to repeat a run or to answer a bug report. No secrets, no environment variables."""
    import torch

    from fasttrain.devices import pick_dtype
    from fasttrain_kernels import (
        ATTENTION_BACKENDS,
        AttentionCase,
        backend_for,
        choose_attention,
        why_not_attention,
    )

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    head = backend_for(torch.empty(0, device=device))
    # what recipes get that leave the type to us, at the head size of most models
    case = AttentionCase(device, pick_dtype("auto", device), 128)
    attention, attention_reason = choose_attention(case)
    cannot = {name: why_not_attention(name, case) for name in ATTENTION_BACKENDS}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": [*(Path(program).name for program in sys.argv[:1]), *sys.argv[1:]],
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "head_backend": head,
        "head_reason": "a CUDA device and triton are there"
        if head == "triton"
        else "no CUDA device, or no triton",
        "attention_backend": attention,
        "attention_reason": attention_reason,
        "attention_cannot": {name: reason for name, reason in cannot.items() if reason},
        "versions": versions,
    }


def _commit() -> str | None:
    """The commit of the checkout fasttrain runs from, None when installed from a wheel."""
    top = Path(__file__).resolve().parent.parent
    if not (top / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(top), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
