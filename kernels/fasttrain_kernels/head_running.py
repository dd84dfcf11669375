"""The online softmax of a block of rows: sums over the part of the vocabulary seen so far, and how parts join."""

from __future__ import annotations

import torch
from torch import Tensor


class Running:
    """State of a block of rows after some logits z; vectors (rows,), fp32, and accumulated products (rows, D).

        s = sum exp(z - m)      q = sum exp(2 (z - m))      a = sum (z - m) exp(z - m)
        acc = sum exp(z - m) z' W                           acc_entropy = sum (z - m) exp(z - m) z' W

    m is the maximum so far, or near enough below it that nothing overflows; z' is dz / d(h.W). `top` is the id of the
    first maximum, `z` the plain sum. When a tile raises m, `follow` is True and the accumulated products have to follow:
    `shrink` is exp(old m - m), `moved` is old m - m.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, *, entropy: bool = False,
                 log_p2: bool = False, top: bool = False, mean: bool = False) -> None:  # fmt: skip
        def zeros(wanted: bool) -> Tensor | None:
            return torch.zeros(rows, dtype=dtype, device=device) if wanted else None

        # The lowest finite number instead of -inf: (m - m') * 0 stays 0 in the first step.
        self.m = torch.full((rows,), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.s = torch.zeros_like(self.m)
        self.a, self.q, self.z = zeros(entropy), zeros(log_p2), zeros(mean)
        self.top = torch.zeros(rows, dtype=torch.int64, device=device) if top else None
        self.shrink, self.moved = torch.zeros_like(self.m), torch.zeros_like(self.m)
        self.started, self.follow = False, True
        self.acc: Tensor | None = None
        self.acc_entropy: Tensor | None = None

    def move_(self, m: Tensor) -> None:
        """Refer the vector sums to another m; leaves in `shrink` and `moved` what the products have to follow."""
        self.moved = self.m - m
        self.shrink = torch.exp(self.moved)
        if self.a is not None:
            self.a.addcmul_(self.moved, self.s).mul_(self.shrink)
        if self.q is not None:
            self.q.mul_(self.shrink * self.shrink)
        self.s.mul_(self.shrink)
        self.m = m

    def move_products_(self) -> None:
        """Make the accumulated products follow the last `move_`."""
        if self.acc_entropy is not None and self.acc is not None:
            # z - m shifts with m: by a multiple of the other accumulator, before that one shrinks.
            self.acc_entropy.addcmul_(self.acc, self.moved[:, None]).mul_(self.shrink[:, None])
        if self.acc is not None:
            self.acc.mul_(self.shrink[:, None])

    def absorb_(self, other: Running) -> None:
        """Add what `other` saw of the same rows, in a later part of the vocabulary."""
        if self.top is not None and other.top is not None:
            self.top = torch.where(other.m > self.m, other.top, self.top)
        m = torch.maximum(self.m, other.m)
        for part in (self, other):
            part.move_(m)
            part.move_products_()
        for name in ("s", "a", "q", "z", "acc", "acc_entropy"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine.add_(theirs)

    def entropy(self) -> Tensor | None:
        return None if self.a is None else self.s.log() - self.a / self.s

    def log_p2(self) -> Tensor | None:
        return None if self.q is None else self.q.log() - 2 * self.s.log()
