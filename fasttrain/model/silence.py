"""What a base model draws at random in training mode, set to zero: policy and reference must be the same function at step 0."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

# Rates that modules apply in training mode only, besides those called dropout: Mixtral's and DBRX's router noise, drop paths.
_NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps", "layerdrop", "drop_prob", "drop_path")
# Routers that draw a token's experts at random in training mode.
_DRAW_EXPERTS = ("PhimoeTopKRouter",)


def silence_dropout(model: nn.Module) -> None:
    """Set the base model's own dropout and router noise to zero, and let batch norms keep their statistics, whatever shares a pack.

    So are the rates of its configuration, which some layers ask in every pass (Falcon, Persimmon); `dropout_as_loaded` gives
    these back where the configuration is saved.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ in _DRAW_EXPERTS or isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = MethodType(_stay, module)  # type: ignore[method-assign]
        for name in _rates(module):
            setattr(module, name, 0.0)
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if hasattr(config, "__dict__")}
    silenced = [(config, name, rate) for config in configs.values() for name, rate in _rates(config).items()]
    for config, name, _ in silenced:
        setattr(config, name, 0.0)
    model.silenced_rates = silenced  # type: ignore[assignment]


@contextlib.contextmanager
def dropout_as_loaded(model: Any) -> Iterator[None]:
    """For the block the configuration's rates as the model's files have them."""
    silenced = getattr(model, "silenced_rates", [])
    for config, name, rate in silenced:
        setattr(config, name, rate)
    try:
        yield
    finally:
        for config, name, _ in silenced:
            setattr(config, name, 0.0)


def _rates(holder: Any) -> dict[str, float]:
    """The rates among a module's or configuration's own values."""
    return {
        name: value
        for name, value in vars(holder).items()
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name or name in _NOISE)
    }


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of a module's `train`: the mode it is in."""
    return module
