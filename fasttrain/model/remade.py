"""Tensors that say how to make them again from others which the backward pass keeps anyway.

A norm's output is cheap to make from its input, SwiGLU's from gate and up; the norm and SwiGLU keep those inputs for their own
backward. A linear that reads such an output needs it for the gradient of its adapter only: it makes it again then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    """`make(*kept)` is the tensor again, bit for bit."""

    make: Callable[..., Tensor]
    kept: tuple[Tensor, ...]


def remade(x: Tensor, make: Callable[..., Tensor], *kept: Tensor) -> Tensor:
    """x, which now says that it is make(*kept)."""
    if torch.is_grad_enabled():
        x.fasttrain_source = Source(make, tuple(one.detach() for one in kept))  # type: ignore[attr-defined]
    return x


def source_of(x: Tensor) -> Source | None:
    """What was said of x; None if nothing was."""
    return getattr(x, "fasttrain_source", None)
