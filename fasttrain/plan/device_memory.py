"""Memory of a device or of this machine: what there is and what is free."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def device_memory(device: torch.device) -> int:
    """Bytes of the device; on CPU of the machine, or of its control group's limit where there is one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _number(_LIMIT)
    return total if limit is None else min(total, limit)


def free_memory(device: torch.device) -> int:
    """Bytes that are free now on the device, what torch holds unused included; on CPU of the machine and its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _available()
    limit, used = _number(_LIMIT), _number(_USED)
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return device_memory(torch.device("cpu"))


def _number(file: Path) -> int | None:
    text = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None
