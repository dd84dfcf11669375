"""Which implementation runs: `triton` on CUDA where Triton is installed, `torch` everywhere else; on which device, in what dtype."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def triton_installed() -> bool:
    """True when the `triton` package can be imported; it is not imported here."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True when Triton's interpreter is on (TRITON_INTERPRET=1): Triton kernels then run on CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def backend_for(tensor: Tensor) -> str:
    """Name of the backend that `backend=None` picks for this tensor: "triton" or "torch"."""
    return "triton" if tensor.device.type == "cuda" and triton_installed() else "torch"


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """The tensor's device as the current one, where Triton launches; nothing for a tensor on the CPU.

    Autograd sees to it in backward passes.
    """
    return torch.cuda.device_of(tensor)


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for a device; there is none on the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of a tensor, as `F.scaled_dot_product_attention` does: its dtype, but fp64 stays fp64."""
    if not autocast_on(x.device) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off; there is none on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def resolve_backend(name: str | None, tensor: Tensor, operation: str) -> str:
    """Check a `backend=` argument against what can run on the tensor's device; ValueError if it cannot."""
    if name is None:
        return backend_for(tensor)
    if name not in ("triton", "torch"):
        raise ValueError(f"{operation}: backend: wanted 'triton', 'torch' or None, got {name!r}")
    if name == "triton" and not triton_installed():
        raise ValueError(f"{operation}: backend: wanted a backend that can run, got 'triton', not installed")
    if name == "triton" and tensor.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"{operation}: backend: 'triton' wants CUDA tensors (or TRITON_INTERPRET=1), got {tensor.device}"
        )
    return name


def check_tensors(operation: str, **named: object) -> None:
    """ValueError that names the argument, where one is no tensor."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{operation}: {name}: wanted a tensor, got {type(x).__name__}")


def outside_graphs(reason: str) -> Callable[[Function], Function]:
    """`torch.compiler.disable`, under which type checkers still see the function's signature."""

    def decorate(function: Function) -> Function:
        disabled: Function = torch.compiler.disable(function, reason=reason)
        return disabled

    return decorate
