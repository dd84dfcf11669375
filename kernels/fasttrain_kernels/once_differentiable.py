"""Backward passes that cannot be differentiated in turn, and always say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, for which a second backward raises, whatever gradient arrived in the first.

    torch's own lets one pass where that gradient has no history, as that of a plain sum has none: what a gradient penalty
    adds to a gradient would be left out without a word.
    """
    once = function.once_differentiable(backward)

    @functools.wraps(backward)
    def with_history(ctx: Any, *grads: Tensor | None) -> Any:
        # gradients are recorded here only under create_graph=True
        if torch.is_grad_enabled():
            grads = tuple(g if g is None or g.requires_grad else g.detach().requires_grad_() for g in grads)
        return once(ctx, *grads)

    return with_history
