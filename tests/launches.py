"""A GPU's stand-in where there is none: tensors on the meta device, which have no numbers, and launches that are noted instead of made.

On the CPU a tensor on the wrong device cannot be told from one on the right device, and a value is there for the asking. On the meta
device an operation on two devices is an error, as on a GPU, and so is asking for a value. Triton's launches see every tensor that a
kernel would get. flash-attn's outputs have their shapes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fasttrain_kernels.shared_prefix_flash import FlashKernel

META = torch.device("meta")
_MOST_PROGRAMS = 65535  # along the second and third axis of CUDA's grids


class Launch(NamedTuple):
    """A kernel's name, the devices of its tensors, the one made current for it, if any, and what Triton compiles it anew for:
    of an integer whether it is 1 and whether 16 divides it."""

    kernel: str
    devices: set[str]
    current: torch.device | None
    variant: tuple[Any, ...]


class FakeFlash(FlashKernel):
    """flash-attn's outputs without its work."""

    version = 2

    def __init__(self) -> None:
        super().__init__(lambda: None, lambda: None)

    def call_forward(self, q: Tensor, k: Tensor, v: Tensor, how: Any, scores: Any) -> tuple[Tensor, Tensor]:
        assert {x.device for x in (q, k, v, how.ends_q, how.ends_k)} == {META}
        return torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)

    def call_backward(self, *given: Any, **_: Any) -> None:
        assert {x.device for x in given if isinstance(x, Tensor)} == {META}


def _need_sums_in_fp32() -> None:
    """Skip where torch (2.11) takes addmm's out_dtype for beta on the meta device, and only there."""
    x = torch.empty(2, 2, dtype=torch.bfloat16, device=META)
    total = torch.empty(2, 2, device=META)
    try:
        torch.addmm(total, x, x, beta=1, out_dtype=torch.float32, out=total)
    except TypeError as error:
        pytest.skip(f"torch {torch.__version__} has no addmm with out_dtype on the meta device: {error}")


def note_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """From here on the meta device is taken for a GPU with Triton and flash-attn; the launches that are made."""
    import triton
    from triton.runtime.jit import mangle_type

    _need_sums_in_fp32()
    launches: list[Launch] = []
    current: list[torch.device] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        for x in args:
            if not isinstance(x, Tensor):
                mangle_type(x)  # TypeError for what Triton takes for no number
        assert max(grid[1:], default=1) <= _MOST_PROGRAMS, (self.fn.__name__, grid)
        devices = {str(x.device) for x in args if isinstance(x, Tensor)}
        variant = tuple(
            (parameter.name, x == 1, x % 16 == 0)
            for parameter, x in zip(self.params, args)
            if isinstance(x, int) and not parameter.do_not_specialize
        )
        launches.append(Launch(self.fn.__name__, devices, current[-1] if current else None, variant))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)

    def put(module: str, name: str, value: Any) -> None:
        # functions of the package have the names of their modules
        monkeypatch.setattr(importlib.import_module(f"fasttrain_kernels.{module}"), name, value)

    for module in ("linear_logprob", "label_logprob", "preference_loss", "layer_passes"):
        put(module, "resolve_backend", lambda name, *_: name or "triton")
    put("preference_loss", "backend_for", lambda tensor: "triton")
    put("shared_prefix_merge", "interpreting", lambda: True)
    put("shared_prefix_attention", "choose_attention", lambda case: ("flash", "a test"))
    put("shared_prefix_attention", "flash_kernel", lambda case: FakeFlash())
    return launches
