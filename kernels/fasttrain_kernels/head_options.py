"""What happens to a logit between the head's product and the log-sum-exp: bias, scale, soft-cap, temperature."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """z = cap(logit_scale * (h.W + bias)) / temperature, with cap(x) = softcap * tanh(x / softcap) or x.

    ValueError when temperature or softcap is not positive, or logit_scale is not finite. They are plain numbers: a tensor would get
    no gradient here.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("softcap", self.softcap)):
            unset = name == "softcap" and value is None
            if not unset and not (isinstance(value, Real) and 0 < value < float("inf")):
                raise ValueError(f"linear_logprob: {name}: wanted a positive finite number, got {value!r}")
        if not (isinstance(self.logit_scale, Real) and abs(self.logit_scale) < float("inf")):
            raise ValueError(f"linear_logprob: logit_scale: wanted a finite number, got {self.logit_scale!r}")

    @property
    def product_scale(self) -> float:
        """Factor to fold into the product h.W (and the bias) before `finish_` sees it."""
        return float(self.logit_scale / (self.temperature if self.softcap is None else self.softcap))

    @property
    def slope_scale(self) -> float:
        """Constant part of dz / d(h.W); the soft-cap multiplies it with 1 - tanh^2."""
        return float(self.logit_scale / self.temperature)

    def finish_(self, product: Tensor) -> Tensor | None:
        """Turn products that already carry `product_scale` into z, in place; return 1 - tanh^2, or None."""
        if self.softcap is None:
            return None
        product.tanh_()
        slope = torch.addcmul(product.new_ones(()), product, product, value=-1)
        product.mul_(self.softcap / self.temperature)
        return slope

    def reference(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """The same, by the book, from bare products; for `linear_logprob_ref`."""
        z = product if bias is None else product + bias
        z = z * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature
